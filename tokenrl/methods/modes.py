"""To think long or short: Adaptive Deep Reasoning's switch of modes, Thinkless's weight of the control token.

    logits = hidden_at_first_token @ weight[[long_id, short_id]].t()           # [S, 2]: no other logit matters
    loss = mode_switch_loss(logits, prefers_long).mean()

    weight = degrpo_weights(control_mask, mask=mask)
    loss, _ = tokenrl.policy_loss("grpo", ..., mask=mask, token_weight=weight, aggregation="token-sum")

S: sequences.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch.checks import check_floats, check_name, check_number, check_tensor
from ..batch.layout import layout_of
from ..errors import described, wrong

KINDS = ("sigmoid", "hinge")


def mode_switch_loss(logits: Tensor, prefers_first: Tensor, *, kind: str = "sigmoid", margin: float = 1.0) -> Tensor:
    """[S], differentiable in logits: with d the logit of the preferred mode less that of the other,

        "sigmoid"   -log sigma(d)
        "hinge"     max(0, margin - d)

    Args:
        logits: fp32 or fp64 [S, 2], of the two tokens that open a mode, at the first position of a response without the
            instruction to take one.
        prefers_first: bool [S], what the rewards of the prompt's rollouts in both modes say.
        kind: "sigmoid" or "hinge".
        margin: of "hinge", in units of the logits.

    Source: Adaptive Deep Reasoning, arXiv 2505.20101 (our reading: its formula is not known to us).
    """
    check_name("kind", kind, KINDS)
    check_number("margin", margin)
    check_floats("logits", logits)
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise wrong("logits", described(logits), "[S, 2], the logits of two tokens")
    check_tensor("prefers_first", prefers_first)
    if prefers_first.dtype != torch.bool or prefers_first.shape != logits.shape[:1]:
        raise wrong("prefers_first", described(prefers_first), f"bool [{logits.shape[0]}]")
    difference = logits[:, 0] - logits[:, 1]
    d = torch.where(prefers_first, difference, -difference)
    return -logsigmoid(d) if kind == "sigmoid" else (margin - d).relu()


def degrpo_weights(
    control_mask: Tensor, *, alpha: float = 1e-3, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """fp32 of the mask's shape, for aggregation "token-sum": alpha / n_c of the n_c control tokens, 1 / n of the n
    others, 0 in masked cells, so that the one token that chooses a mode does not drown in the rest.

    Args:
        control_mask: bool [B, T], or [N] with cu_seqlens; in the authors' code the first token of each response.
        alpha: at least 0.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: DeGRPO, Thinkless (authors' code).
    """
    check_number("alpha", alpha, 0)
    check_tensor("control_mask", control_mask)
    if control_mask.dtype != torch.bool:
        raise wrong("control_mask", f"dtype {control_mask.dtype}", "torch.bool")
    layout = layout_of(control_mask, mask=mask, cu_seqlens=cu_seqlens, name="control_mask")
    control, valid = control_mask.reshape(-1), layout.valid()
    control, rest = valid & control, valid & ~control
    weight = alpha * control.double() / control.sum().clamp(min=1) + rest.double() / rest.sum().clamp(min=1)
    return weight.float().view(layout.shape)
