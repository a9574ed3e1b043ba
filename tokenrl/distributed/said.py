"""What ranks compare of a call before its first exchange, as text."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch.layout import Layout
from ..ops import dispatch
from ..ops.dispatch import PolicyLossInputs
from ..ops.kernel_ops import Transform
from ..ops.linear.head import HeadInputs
from ..ops.preference_reference import PreferenceInputs

if TYPE_CHECKING:
    from .agreement import Agreement


def said_of(transform: Transform | HeadInputs) -> str:
    """Temperatures per row and masks are the ranks' to keep alike."""
    per_row = "" if transform.temperatures is None else " per row"
    return f"{transform.temperature}{per_row} {transform.softcap} {transform.logit_scale}"


def said_of_loss(layout: Layout, head: HeadInputs, inputs: PolicyLossInputs) -> dict[str, Any]:
    """Of a loss from hidden states; ranks with other numbers would each train another one."""
    extra = inputs.regularizers
    numbers = [p for p in inputs.gate.params() if not isinstance(p, Tensor)]
    return {
        "tokens": layout.num_tokens,
        "dtype": head.dtype,
        "transform": said_of(head),
        "gradients": dispatch.wanted(head),
        "objective": f"{inputs.row.name} {inputs.aggregation} {numbers}",
        "terms": f"{extra.kl.name} {extra.kl_coef} {extra.kl_ratio} {extra.entropy_coef}",
        "optional": [name for name, x in _optional(inputs).items() if x is not None],
    }


def _optional(inputs: PolicyLossInputs) -> dict[str, Tensor | None]:
    extra = inputs.regularizers
    return {
        "old_logp": inputs.old_logp, "advantages": inputs.advantages, "token_weight": inputs.token_weight,
        "segment_ids": inputs.starts, "ref_logp": extra.ref_logp, "kl_weight": extra.kl_weight,
        "entropy_weight": extra.entropy_weight,
    }  # fmt: skip


def agree_on_preference(agreed: "Agreement", layout: Layout, head: HeadInputs, inputs: PreferenceInputs) -> None:
    row = inputs.row
    optional = {name: x is not None for name, x in vars(inputs).items() if x is None or isinstance(x, Tensor)}
    agreed.same(
        tokens=layout.num_tokens, dtype=head.dtype, transform=said_of(head), gradients=dispatch.wanted(head),
        memory_budget=head.memory_budget, objective=f"{row.name} {row.link.params()} {row.score.params()}",
        optional=sorted(name for name, there in optional.items() if there),
    )  # fmt: skip
    agreed.contents(ids=head.ids, mask=layout.valid(), cu_seqlens=layout.cu_seqlens)
    if inputs.sides is not None:
        agreed.contents(pairs=torch.stack(inputs.sides))
