"""With --noise, torch's GEMMs and sums err by a rounding, each time another: torch promises no bits of them, so no test
may need any. What is exact in any order, sums of whole numbers, stays exact. A profile shows each GEMM twice."""

import warnings

import torch

LIBRARY = torch.library.Library("aten", "IMPL")
# Each by the overload that computes it into a tensor that is given, which stays as it is.
OPS = {
    "mm": "mm.out", "addmm": "addmm.out", "bmm": "bmm.out", "baddbmm": "baddbmm.out", "addmv": "addmv.out",
    "sum.dim_IntList": "sum.IntList_out", "mean.dim": "mean.out", "_softmax": "_softmax.out",
    "_log_softmax": "_log_softmax.out",
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--noise", action="store_true", help="torch's GEMMs and sums err by a rounding, each time another")


def pytest_configure(config):
    if not config.getoption("noise"):
        return
    generator = torch.Generator().manual_seed(0)
    for name, computing in OPS.items():
        op, overload = computing.split(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LIBRARY.impl(name, _noisy(getattr(getattr(torch.ops.aten, op), overload), generator), "CPU")


def _noisy(compute, generator):
    def op(*args, **kwargs):
        like = next(x for x in args if isinstance(x, torch.Tensor))
        dtype = kwargs.get("dtype") or like.dtype
        if compute is torch.ops.aten.sum.IntList_out and not dtype.is_floating_point:
            dtype = kwargs.get("dtype") or torch.int64
        if compute in (torch.ops.aten._softmax.out, torch.ops.aten._log_softmax.out) and args[2]:
            dtype = torch.float32  # half_to_float
        out = compute(*args, **kwargs, out=torch.empty(0, dtype=dtype))
        if dtype not in (torch.float32, torch.float64):  # 16 bits round the noise away
            return out
        exact = out == out.round()
        if compute in (torch.ops.aten.sum.IntList_out, torch.ops.aten.mean.out):  # of no more than one number
            dims = list(args[1]) if len(args) > 1 and args[1] else list(range(like.dim()))
            keep = bool(args[2]) if len(args) > 2 else kwargs.get("keepdim", False)
            terms = torch.ops.aten.sum.IntList_out(like != 0, dims, keep, out=torch.empty(0, dtype=torch.int64))
            exact |= terms < 2
        steps = torch.randint(-1, 2, out.shape, generator=generator).to(dtype)
        return torch.where(exact, out, out * (1 + steps * torch.finfo(dtype).eps))

    return op
