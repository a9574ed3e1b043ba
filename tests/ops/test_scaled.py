"""The gradients of a loss times what comes from above: one rounding, on the CPU too."""

import pytest
import torch

from tokenrl.ops.linear.gemm import scaled, sum_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", [0.1237654, -3.3 * 2.0**16, 1.0])
def test_a_product_is_rounded_once(by, dtype, out):
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    factor = torch.tensor(by, dtype=torch.float64)
    found = scaled(x, factor, out)
    wide = sum_dtype(dtype)
    assert found.dtype == out and found.data_ptr() != x.data_ptr()
    assert torch.equal(found, (x.to(wide) * factor.to(wide)).to(out))
