"""Liger's cross entropy of logits and of hidden states."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...batch.checks import check_name
from ...errors import described, wrong
from ...logprobs.token_stats import TokenStats
from ..cross_entropy import CrossEntropy, reduced


@dataclass
class CrossEntropyOutput:
    """What the losses return where more than the loss is asked for; predicted_tokens are not computed."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: None = None


class _Loss(torch.nn.Module):
    """What the losses of logits and of hidden states share."""

    def __init__(
        self, ignore_index: int, lse_square_scale: float, label_smoothing: float, reduction: str, softcap: float | None,
        return_z_loss: bool, return_token_accuracy: bool, **refused: Any,
    ):  # fmt: skip
        super().__init__()
        check_name("reduction", reduction, ("mean", "sum", "none"))
        for name, given in refused.items():
            if given is not None and given is not False:
                raise wrong(name, described(given), "None, or False: tokenrl does not compute it")
        accuracy = ("is_top1",) if return_token_accuracy else ()
        self.terms = CrossEntropy(label_smoothing, lse_square_scale, softcap, ignore_index, *accuracy)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy

    def output(
        self, losses: Tensor, z_losses: Tensor, stats: TokenStats, target: Tensor
    ) -> Tensor | CrossEntropyOutput:
        counted = target != self.ignore_index
        loss = reduced(losses, counted, self.reduction)
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        z_loss = reduced(z_losses, counted, self.reduction) if self.return_z_loss else None
        accuracy = None
        if self.return_token_accuracy:
            accuracy = reduced(stats.is_top1.float(), counted, "none" if self.reduction == "none" else "mean")
        return CrossEntropyOutput(loss, z_loss, accuracy)


class LigerCrossEntropyLoss(_Loss):
    """Liger: forward(logits [N, V], target [N]) is the cross entropy, in fp32 (fp64 for fp64), its gradient where
    autograd cannot notice in the memory of the logits, as Liger's.

    return_z_loss, return_token_accuracy: a CrossEntropyOutput, of the same reduction (a "sum" has the mean accuracy).
    The mean of no label is 0. Errors: ValueError naming the argument; so for weight, return_predicted_tokens, and
    label_smoothing beside softcap.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__(
            ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, return_token_accuracy,
            weight=weight, return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        return self.output(*self.terms.of_logits(_input, target, inplace=True), target)


class LigerFusedLinearCrossEntropyLoss(_Loss):
    """Liger: forward(lin_weight [V, D], _input [N, D], target [N], bias [V]) by linear_token_logprobs, without logits.

    use_token_scaling: each loss times its label's probability, without the gradient of that. accum_dtype: None or
    torch.float32, which sums of gradients always are. The rest: as LigerCrossEntropyLoss.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__(
            ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, return_token_accuracy,
            ce_weight=ce_weight, return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip
        if accum_dtype not in (None, torch.float32):
            raise wrong("accum_dtype", accum_dtype, "None or torch.float32")
        self.use_token_scaling = use_token_scaling

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        losses, z_losses, stats = self.terms.of_hidden(_input, lin_weight, target, bias)
        if self.use_token_scaling:
            probability = stats.logp.detach().exp()
            losses, z_losses = losses * probability, z_losses * probability
        return self.output(losses, z_losses, stats, target)


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Liger: LigerCrossEntropyLoss as a function; size_average and reduce are torch's old names of reduction."""
    for name, given in (("size_average", size_average), ("reduce", reduce)):
        if given is not None:
            raise wrong(name, described(given), "None (reduction='mean', 'sum' or 'none' says it)")
    return LigerCrossEntropyLoss(
        weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
        return_token_accuracy, return_predicted_tokens,
    )(input, target)  # fmt: skip


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Liger: LigerFusedLinearCrossEntropyLoss as a function. chunk_mem_const has no effect."""
    return LigerFusedLinearCrossEntropyLoss(
        ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss, accum_dtype,
        use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )(weight, input, target, bias)  # fmt: skip
