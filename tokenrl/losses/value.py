"""value_loss: of a value head on labels per token, such as those of advantages.prefix_values."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch.checks import check_constant, check_floats, check_name
from ..batch.layout import layout_of
from .building_blocks import group_aggregate

KINDS = ("mse", "bce")


def value_loss(
    values: Tensor,
    labels: Tensor,
    *,
    kind: str = "mse",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """sum_t w_t l_t, 0-d:

        "mse"   l = (v - label)^2                                           dl / dv = 2 (v - label)
        "bce"   l = -label log sigma(v) - (1 - label) log sigma(-v)         dl / dv = sigma(v) - label

    Args:
        values: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; logits of the value for "bce". They get a gradient.
        labels: of their shape, constant; in [0, 1] for "bce".
        kind: "mse" or "bce".
        mask: bool; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        aggregation: w, as for tokenrl.aggregation_weights, without groups.
        normalizer: as for tokenrl.aggregation_weights.
        backend: as for policy_loss.

    Source: TVM, arXiv 2407.12863 (our reading: its loss is not known to us).
    """
    check_name("kind", kind, KINDS)
    check_floats("values", values)
    check_floats("labels", labels)
    check_constant("labels", labels)
    layout = layout_of(values, mask=mask, cu_seqlens=cu_seqlens, name="values")
    layout.check_tokens("labels", labels)
    valid = layout.valid().view(layout.shape)
    v, label = torch.where(valid, values, 0), torch.where(valid, labels, 0).to(values.dtype)
    if kind == "mse":
        losses = (v - label).square()
    else:
        losses = -label * logsigmoid(v) - (1 - label) * logsigmoid(-v)
    return group_aggregate(
        losses, aggregation, mask=mask, cu_seqlens=cu_seqlens, normalizer=normalizer, backend=backend
    )
