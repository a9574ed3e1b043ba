"""The cross entropy of Liger and flash-attn per label, by token_logprobs: smoothed, and with a z loss.

loss = -(1 - e) log p_label + e (lse - mean z) + c lse^2,   z_loss = c lse^2     e label_smoothing, c lse_square_scale
"""

from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_number, check_tensor
from ..errors import wrong
from ..logprobs.from_hidden import head_dtype, linear_token_logprobs
from ..logprobs.from_logits import token_logprobs
from ..logprobs.token_stats import TokenStats
from ..ops.linear.gemm import linear, sum_dtype
from .stats import may_be_in_place


class CrossEntropy:
    """label_smoothing, lse_square_scale, softcap and ignore_index, checked; more: names of further statistics.

    The mean of the logits has a gradient in torch alone, so smoothing costs a pass of its own over logits in memory; of
    a head it is a product with the mean of the weight's rows. Under a softcap it is neither.
    """

    def __init__(
        self, label_smoothing: float, lse_square_scale: float, softcap: float | None, ignore_index: int, *more: str
    ):
        check_number("label_smoothing", label_smoothing, 0, 1)
        check_number("lse_square_scale", lse_square_scale)
        if softcap is not None and label_smoothing > 0:
            raise wrong("label_smoothing", f"{label_smoothing} with softcap {softcap}", "one of the two")
        self.smoothing, self.scale, self.ignore_index = label_smoothing, lse_square_scale, ignore_index
        wants_lse = label_smoothing > 0 or lse_square_scale != 0
        outputs = ["logp", *(["lse"] if wants_lse else []), *more]
        self.how: dict[str, Any] = {"outputs": outputs, "softcap": softcap, "ignore_index": ignore_index}

    def of_logits(
        self, logits: Tensor, labels: Tensor, logit_scale: float = 1.0, inplace: bool = False
    ) -> tuple[Tensor, Tensor, TokenStats]:
        """(losses, z losses, statistics) of logits [N, V] and labels [N], 0 where ignored; only losses have gradients.
        inplace permits the gradient to lie in the memory of the logits."""
        check_tensor("logits", logits)
        inplace = inplace and may_be_in_place(logits)
        stats = token_logprobs(logits, labels, logit_scale=logit_scale, inplace_backward=inplace, **self.how)
        mean = None
        if self.smoothing > 0:
            mean = logit_scale * logits.mean(-1, dtype=sum_dtype(logits.dtype))
        return *self._losses(stats, mean, labels), stats

    def of_hidden(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, TokenStats]:
        """The same of hidden @ weight^T + bias, hidden [N, D]; the head computes in autocast's dtype where it is on."""
        dtype = head_dtype(hidden)
        stats = linear_token_logprobs(hidden, weight, labels, bias=bias, compute_dtype=dtype, **self.how)
        mean = None
        if self.smoothing > 0:
            total = sum_dtype(dtype)
            read = torch.where((labels == self.ignore_index)[:, None], 0, hidden).to(total)
            mean = linear(read, weight.mean(0, keepdim=True, dtype=total))[:, 0]
            mean = mean if bias is None else mean + bias.mean(dtype=total)
        return *self._losses(stats, mean, labels), stats

    def _losses(self, stats: TokenStats, mean: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = -stats.logp
        if mean is not None:
            uniform = stats.lse - torch.where(labels == self.ignore_index, 0, mean)
            losses = (1 - self.smoothing) * losses + self.smoothing * uniform
        if self.scale == 0:
            return losses, torch.zeros_like(losses)
        z_losses = self.scale * stats.lse.square()
        return losses + z_losses, z_losses.detach()


def reduced(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """By "mean" over the labels that are counted (0 of none), "sum" or "none"."""
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum().clamp(min=1) if reduction == "mean" else losses.sum()
