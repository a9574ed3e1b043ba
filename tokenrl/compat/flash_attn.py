"""Drop-ins for flash-attn's cross entropy (flash_attn.ops.triton.cross_entropy, flash_attn.losses.cross_entropy 2.8.4).

The names, the arguments and the numbers are flash-attn's; they run where tokenrl runs, a CPU too. What differs: an
inplace_backward is a permission, used where autograd cannot notice; the mean over no label is 0; ignored rows may hold
anything; a process_group and a precomputed_lse are refused by name, as tokenrl reads whole rows.
"""

from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_name
from ..errors import described, wrong
from .cross_entropy import CrossEntropy, reduced


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> tuple[Tensor, Tensor]:
    """flash-attn: (losses [N], z losses [N]) of logits [N, V] and labels [N], fp32 (fp64 for fp64), 0 where ignored.

        losses = -(1 - e) log p_label + e (lse - mean z) + z_losses,   z = logit_scale logits,   e = label_smoothing
        z_losses = lse_square_scale lse^2, without gradient

    label_smoothing costs a pass of torch over the logits, whose mean has no gradient in the kernels.
    Errors: ValueError naming the argument.
    """
    for name, given in (("precomputed_lse", precomputed_lse), ("process_group", process_group)):
        if given is not None:
            raise wrong(name, described(given), "None: rows are whole, and one pass makes their lse")
    terms = CrossEntropy(label_smoothing, lse_square_scale, None, ignore_index)
    return terms.of_logits(logits, labels, logit_scale, inplace_backward)[:2]


class CrossEntropyLoss(torch.nn.Module):
    """flash-attn: forward(input [N, V], target [N]) is the loss of cross_entropy_loss, reduced; (loss, z loss) with
    return_z_loss."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: None = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        check_name("reduction", reduction, ("mean", "sum", "none"))
        self.reduction, self.return_z_loss = reduction, return_z_loss
        self.how: dict[str, Any] = {
            "label_smoothing": label_smoothing, "logit_scale": logit_scale, "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index, "inplace_backward": inplace_backward, "process_group": process_group,
        }  # fmt: skip

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: None = None) -> Tensor | tuple[Tensor, Tensor]:
        losses = cross_entropy_loss(input, target, precomputed_lse, **self.how)
        loss, z_loss = (reduced(x, target != self.how["ignore_index"], self.reduction) for x in losses)
        return (loss, z_loss) if self.return_z_loss else loss
