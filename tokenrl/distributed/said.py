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


def said_of_heads(*heads: HeadInputs) -> dict[str, Any]:
    """What chunks are cut by, which set how often ranks exchange, and of what size."""
    return {
        "memory_budget": heads[0].memory_budget,
        "dtype": heads[0].compute_dtype,
        "width": [head.hidden.shape[1] for head in heads],
        "keep_mask": ["per row" if _per_row(head) else "of the vocabulary" for head in heads],
        "transform": [said_of(head) for head in heads],
    }


def _per_row(head: HeadInputs) -> bool:
    return head.keep_mask is not None and head.keep_mask.shape[0] > 1


def said_of_loss(layout: Layout, head: HeadInputs, inputs: PolicyLossInputs) -> dict[str, Any]:
    """Of a loss from hidden states; ranks with other numbers would each train another one."""
    extra = inputs.regularizers
    numbers = [p for p in inputs.gate.params() if not isinstance(p, Tensor)]
    return {
        "tokens": layout.num_tokens,
        **said_of_heads(head),
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


def agree_on_preference(
    agreed: "Agreement", layout: Layout, head: HeadInputs, inputs: PreferenceInputs, ref_width: int | None
) -> None:
    """ref_width: of the reference's hidden states; None: its log-probs are given, or none wanted."""
    optional = {name: x is not None for name, x in vars(inputs).items() if x is None or isinstance(x, Tensor)}
    agreed.same(
        tokens=layout.num_tokens, **said_of_heads(head), ref_width=ref_width, gradients=dispatch.wanted(head),
        objective=inputs.row, optional=sorted(name for name, there in optional.items() if there),
    )  # fmt: skip
    agreed.contents(ids=head.ids, mask=layout.valid(), cu_seqlens=layout.cu_seqlens)
    if inputs.sides is not None:
        agreed.contents(pairs=torch.stack(inputs.sides))
