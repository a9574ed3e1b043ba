"""token_logprobs behind the signatures of others."""

import torch

from ..batch.checks import check_tensor
from ..errors import wrong
from ..logprobs.from_logits import made_by_torch, token_logprobs, why_not_inplace
from ..logprobs.token_stats import TokenStats
from ..ops import backends
from ..ops.kernel_ops import IGNORED


def stats_of(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float,
    row_mask: torch.Tensor | None,
    outputs: tuple[str, ...],
    inplace_backward: bool = False,
    name: str = "index",
) -> TokenStats:
    check_tensor("logits", logits)
    check_tensor(name, index)
    rows = logits.shape[:-1]
    if index.shape[: len(rows)] != rows or index.dim() > logits.dim():
        raise wrong(name, f"shape {list(index.shape)}", f"one id per row of logits, {list(rows)}, or K of them")
    if row_mask is not None:
        check_tensor("row_mask", row_mask)
        if row_mask.shape != index.shape:
            raise wrong("row_mask", f"shape {list(row_mask.shape)}", f"the shape of {name}, {list(index.shape)}")
        index = index.masked_fill(row_mask == 0, IGNORED)
    if logits.dim() not in (2, 3):
        index = index.reshape(rows.numel(), *index.shape[len(rows) :])
        logits = logits.reshape(rows.numel(), logits.shape[-1])
    return token_logprobs(logits, index, temperature=temperature, outputs=outputs, inplace_backward=inplace_backward)


def may_be_in_place(logits: torch.Tensor) -> bool:
    """Whether a gradient in the memory of the logits, where a caller permits it, goes unnoticed."""
    return why_not_inplace(logits, backends.choose(None, logits.device)) is None and made_by_torch(logits)
