"""One head whose logits are a z + b z' of two heads: for divergences from, and statistics of, such a combination."""

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_number, check_tensor
from ..errors import wrong


def combined_head(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    a: float | Tensor,
    b: float | Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(hidden, weight) with hidden @ weight^T = a (hidden @ weight^T + bias) + b (other_hidden @ other_weight^T +
    other_bias), to hand to any linear_* function in the place of a head: contrastive decoding, AlignDistil's teacher.

        [a hidden | b other_hidden | a | b] of [weight | other_weight | bias | other_bias], of biases what there is
        a hidden + b other_hidden of weight, where other_weight is weight itself, a head that both share

    Gradients go to every tensor that requires one, by autograd. The weight, of D + D' columns, is a copy: of frozen
    heads make it once.

    Args:
        hidden: [N, D] or [B, T, D], all tensors of one dtype.
        weight: [V, D].
        other_hidden: [N, D'] or [B, T, D'].
        other_weight: [V, D'].
        a: a number, or one per token, [N] or [B, T].
        b: likewise.
        bias: [V], of the first head; None for none.
        other_bias: [V], of the other one.
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("other_hidden", other_hidden)):
        check_tensor(name, x)
    check_tensor("other_weight", other_weight)
    if other_hidden.shape[:-1] != hidden.shape[:-1] or len(other_weight) != len(weight):
        given = f"{list(other_hidden.shape)} and a head of {len(other_weight)}"
        raise wrong("other_hidden", given, f"{[*hidden.shape[:-1], 'D']} and a head of {len(weight)}")
    scales = [_scale(name, x, hidden) for name, x in (("a", a), ("b", b))]
    parts = [(scale * as_saved(x)).to(x.dtype) for scale, x in zip(scales, (hidden, other_hidden), strict=True)]
    shared = other_weight is weight
    columns = [weight] if shared else [weight, other_weight]
    found = [parts[0] + parts[1]] if shared else parts
    for scale, column in zip(scales, (bias, other_bias), strict=True):
        if column is not None:
            found.append(scale.to(hidden.dtype).expand(*hidden.shape[:-1], 1))
            columns.append(column[:, None])
    if len(found) == 1:
        return found[0], weight
    return torch.cat(found, -1), torch.cat(columns, -1)


def _scale(name: str, x: float | Tensor, hidden: Tensor) -> Tensor:
    """[.., 1] or 0-d, fp32 or fp64."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if not isinstance(x, Tensor):
        check_number(name, x)
        return torch.tensor(x, dtype=wide, device=hidden.device)
    if x.shape != hidden.shape[:-1]:
        raise wrong(name, f"shape {list(x.shape)}", f"a number, or one per token, {list(hidden.shape[:-1])}")
    return as_saved(x).to(wide)[..., None]
