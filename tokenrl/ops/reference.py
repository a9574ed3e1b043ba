"""The whole pipeline in differentiable torch: the authority that every kernel is tested against.

The functions carry the names and arguments of the ops (tokenrl/ops/kernel_ops.py). What crosses tokens happens on
[spans, length] matrices.
"""

import torch
from torch import Tensor

from ..objectives import statistics
from ..objectives.divergences import Divergence
from ..objectives.gates.base import Bound, Gate, map_params, straight_through
from ..objectives.metrics import EXTREMES, NOTHING, of_tokens
from .kernel_ops import Transform
from .linear.gemm import linear
from .linear.head import HeadInputs
from .ranges import ranged


class Rows:
    """Flat tokens [N] as a matrix [spans, length] and back; spans are sequences or the segments inside them."""

    def __init__(self, num_tokens: int, cu_seqlens: Tensor, starts: Tensor | None, width: int | None):
        self.width = width if starts is None else None
        self.num_tokens = num_tokens
        self.shape = (cu_seqlens.numel() - 1, width or 0)
        if self.width is None:
            first = torch.zeros(num_tokens + 1, dtype=torch.bool, device=cu_seqlens.device)
            first[cu_seqlens] = True
            first = first[:-1] if starts is None else first[:-1] | starts
            begins = first.nonzero().squeeze(1)
            self.span = first.cumsum(0) - 1
            self.column = torch.arange(num_tokens, device=cu_seqlens.device) - begins[self.span]
            self.shape = (begins.numel(), int(self.column.max()) + 1 if num_tokens else 0)

    def matrix(self, flat: Tensor) -> Tensor:
        if self.width is not None:
            return flat.view(self.shape)
        return flat.new_zeros(self.shape).index_put((self.span, self.column), flat)

    def flat(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1) if self.width is not None else matrix[self.span, self.column]


def regularized(
    objective: Tensor, kl: Tensor | None, kl_coef: float, entropy: Tensor | None, entropy_coef: float
) -> Tensor:
    """objective + kl_coef kl - entropy_coef entropy; None has no part. Of losses and, as it is linear, of their
    gradients."""
    if kl is not None and kl_coef != 0:
        objective = objective + kl_coef * kl
    if entropy is not None and entropy_coef != 0:
        objective = objective - entropy_coef * entropy
    return objective


@ranged
def objective(
    logp: Tensor, old_logp: Tensor, advantages: Tensor | None, mask: Tensor, cu_seqlens: Tensor, starts: Tensor | None,
    span_weight: Tensor, normalizer: Tensor, token_weight: Tensor | None, statistic: str, flow: str, gate: Gate,
    clamp: float, cap: float, width: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, metrics): x = clamp(logp - old_logp); s = min(S x, cap); loss = sum_t w_t gate(s_t)."""
    rows = Rows(logp.numel(), cu_seqlens, starts, width)
    kept = torch.where(mask, logp, 0)
    x = torch.clamp(kept - torch.where(mask, old_logp, 0), -clamp, clamp)
    valid = rows.matrix(mask)
    t = valid.cumsum(1)
    s = rows.flat(statistics.STATISTICS[statistic](rows.matrix(x), valid, t.to(x.dtype)))
    if flow == "local":  # the statistic of all tokens, the derivative of the own one alone
        s = straight_through(s, kept)
    s = s.clamp(max=cap)
    t = rows.flat(t).clamp(min=1).to(x.dtype)
    a = per_token(advantages, cu_seqlens, mask, logp)
    gate = map_params(gate, lambda name, bound: torch.where(mask, bound, 1))
    s, own = torch.where(mask, s, 0), straight_through(x, kept)
    w = token_weights(span_weight, normalizer, token_weight, cu_seqlens, mask, logp)
    live = w != 0
    if gate.uses_advantages and gate.vanishes:
        live = live & (a != 0)
    # What is not live enters no derivative either: 0 times an infinite slope would be NaN.
    shown, own, logp = (torch.where(live, y, 0) for y in (s, own, kept))
    loss = torch.where(live, w * gate.value(shown, own, logp, a, t), 0).sum()
    return loss, _metrics(gate, x.detach(), s.detach(), kept.detach(), a, t, mask)


def per_token(values: Tensor | None, cu_seqlens: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """[S] or [N] -> [N], zero in masked cells."""
    if values is None:
        return torch.zeros_like(like, requires_grad=False)
    if values.numel() != mask.numel():
        values = values.repeat_interleave(cu_seqlens.diff(), output_size=mask.numel())
    return torch.where(mask, values, 0).to(like.dtype)


def token_weights(
    span_weight: Tensor, normalizer: Tensor, token_weight: Tensor | None, cu_seqlens: Tensor, mask: Tensor, like: Tensor
) -> Tensor:
    """w_t [N] in the dtype of `like`, zero in masked cells."""
    weight = torch.where(span_weight == 0, 0.0, span_weight / normalizer)
    w = weight.repeat_interleave(cu_seqlens.diff(), output_size=mask.numel())
    if token_weight is not None:
        w = w * torch.where(mask, token_weight, 0)
    return torch.where(mask, w, 0).to(like.dtype)


def _metrics(gate: Gate, x: Tensor, s: Tensor, logp: Tensor, a: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    if not mask.numel():
        return torch.tensor(NOTHING, dtype=torch.float64, device=mask.device)
    entries = of_tokens(gate, s, x, logp, a, t, mask)
    return torch.stack([getattr(entry, EXTREMES.get(name, "sum"))().double() for name, entry in entries.items()])


@ranged
def statistic(
    logp: Tensor, old_logp: Tensor, mask: Tensor, cu_seqlens: Tensor, starts: Tensor | None, statistic: str, flow: str,
    width: int | None,
) -> Tensor:  # fmt: skip
    """The statistic of the log ratios, [N], zero in masked cells; see tokenrl/objectives/statistics.py."""
    rows = Rows(logp.numel(), cu_seqlens, starts, width)
    kept = torch.where(mask, logp, 0)
    valid = rows.matrix(mask)
    x = rows.matrix(kept - torch.where(mask, old_logp, 0))
    s = rows.flat(statistics.STATISTICS[statistic](x, valid, valid.cumsum(1).to(x.dtype)))
    if flow == "local":
        s = straight_through(s, kept)
    return torch.where(mask, s, 0)


@ranged
def position_adaptive_clip(
    log_ratio: Tensor, mask: Tensor, cu_seqlens: Tensor, eps_low: Bound, eps_high: Bound, power: Bound,
    width: int | None,
) -> Tensor:  # fmt: skip
    """clip(x, -eps_low t^power, eps_high t^power), [N], zero in masked cells; differentiable in log_ratio."""
    rows = Rows(log_ratio.numel(), cu_seqlens, None, width)
    t = rows.flat(rows.matrix(mask).cumsum(1)).clamp(min=1).to(log_ratio.dtype)
    x = torch.where(mask, log_ratio, 0)
    band = t**power
    inside = (x >= -eps_low * band) & (x <= eps_high * band)
    edge = torch.where(x < 0, -eps_low * band, eps_high * band).to(x.dtype)
    return torch.where(mask, torch.where(inside, x, edge), 0)


@ranged
def aggregation_weights(
    mask: Tensor | None, cu_seqlens: Tensor, num_tokens: int, advantages: Tensor | None, group_ids: Tensor | None,
    span: str, unit: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(span_weight float64 [S], normalizer float64): the table at the head of tokenrl/objectives/aggregations.py."""
    sequences = cu_seqlens.numel() - 1
    if mask is None:
        mask = torch.ones(num_tokens, dtype=torch.bool, device=cu_seqlens.device)
    index = torch.arange(sequences, device=cu_seqlens.device)
    owner = index.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    n = torch.zeros(sequences, dtype=torch.int64, device=mask.device).index_add(0, owner, mask.long())
    nonempty = n > 0
    counts = {"one": torch.ones_like(n[:1].sum()), "tokens": n, "rows": nonempty}
    weight = torch.ones(sequences, dtype=torch.float64, device=mask.device)
    if span == "inverse_length":
        weight = 1 / n.clamp(min=1).double()
    if group_ids is not None:
        # A group's number is where its first sequence stands in order.
        group = torch.searchsorted(group_ids.sort().values, group_ids)

        def total(counted: Tensor) -> Tensor:
            return torch.zeros_like(n).index_add(0, group, counted.long())

        counts["groups"], tokens = total(nonempty) > 0, total(n)[group]
        if span == "balanced":
            assert advantages is not None
            if advantages.numel() == num_tokens:
                advantages = advantages.new_zeros(sequences).index_add(0, owner, torch.where(mask, advantages, 0))
            above, below = advantages > 0, advantages < 0
            rows = [total(some & nonempty)[group] for some in (above, below, nonempty)]
            lengths = [total(torch.where(sign, n, 0))[group] for sign in (above, below)]
            weight = torch.where(above, rows[0], rows[1]).double() / rows[2].clamp(min=1)
            tokens = torch.where(above | below, torch.where(above, lengths[0], lengths[1]), 0)
        weight = torch.where(tokens > 0, weight / tokens.clamp(min=1), 0.0)
    return torch.where(nonempty, weight, 0.0), counts[unit].sum().double() * scale


def _transformed(
    logits: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float
) -> Tensor:
    """z in at least fp32; a logit of -inf stays one under the softcap: it was taken out of the vocabulary."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap != float("inf"):
        x = torch.where(x == -torch.inf, x, softcap * torch.tanh(x / softcap))
    return x / (temperature if temperatures is None else temperatures[..., None])


@ranged
def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float,
    keep_mask: Tensor | None, outputs: list[str], inplace_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's results, zero where an id, or every id of a row, is -100; anything where an output is not asked for."""
    if ids.dim() < logits.dim():
        how = (temperature, temperatures, softcap, logit_scale, keep_mask, outputs, inplace_backward)
        logp, *per_row, is_top1, rank = token_logprobs(logits, ids[..., None], *how)
        return logp.squeeze(-1), *per_row, is_top1.squeeze(-1), rank.squeeze(-1)
    used, row_used = ids != -100, (ids != -100).any(-1)
    logits = torch.where(row_used[..., None], logits, 0)
    z = _transformed(logits, temperature, temperatures, softcap, logit_scale)
    if keep_mask is not None:
        keep_mask = keep_mask | ~row_used[..., None]
        z = torch.where(keep_mask, z, -torch.inf)
    z = z + torch.where(z == torch.inf, torch.nan, 0)  # no distribution: NaN for the row, as in the kernels
    lse = z.logsumexp(-1)
    log_p = z - lse[..., None]
    p = log_p.exp()
    logp = torch.where(used, log_p.gather(-1, torch.where(used, ids, 0)), 0)
    entropy = -(p * torch.where(p > 0, log_p, 0)).sum(-1)
    log_sum_sq_probs = (2 * log_p).logsumexp(-1) if "log_sum_sq_probs" in outputs else lse.detach()
    with torch.no_grad():
        mean = z.mean(-1) if keep_mask is None else torch.where(keep_mask, z, 0).sum(-1) / keep_mask.sum(-1)
        max_prob = (z.amax(-1) - lse).exp()
        order = _order(logits.detach(), ids, keep_mask) if {"is_top1", "rank"} & {*outputs} else (ids, ids)
    stats = (entropy, lse, torch.zeros_like(lse.detach()), log_sum_sq_probs, mean, max_prob)
    return logp, *(torch.where(row_used, value, 0) for value in stats), *order


@ranged
def divergence(
    logits: Tensor, other_logits: Tensor, rows: Tensor | None, transform: Transform, other: Transform,
    kind: Divergence,
) -> Tensor:  # fmt: skip
    """Of the rows, 0 where rows is false."""
    (log_p, some), (log_r, others) = (
        _log_probs(x, rows, how) for x, how in ((logits, transform), (other_logits, other))
    )
    value = kind.terms(log_p, log_r).sum(-1) * torch.where(some & others, 1, torch.nan)  # a kind may select NaN away
    return value if rows is None else torch.where(rows, value, 0)


def _log_probs(logits: Tensor, rows: Tensor | None, transform: Transform) -> tuple[Tensor, Tensor]:
    """Of the rows that count, with -inf where a logit is, which gets no gradient; and whether they have any."""
    z = divergence_logits(logits, rows, transform)
    lse = z.logsumexp(-1, keepdim=True)
    return log_probs_under(z, lse), lse.detach().squeeze(-1).isfinite()


def log_probs_under(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse, of which entries of -inf get no gradient."""
    gone = z == -torch.inf
    log_p = torch.where(gone, z.detach(), z) - lse
    return torch.where(gone, log_p.detach(), log_p)


def divergence_logits(logits: Tensor, rows: Tensor | None, transform: Transform) -> Tensor:
    """Transformed, those of rows that do not count zeros."""
    if rows is not None:
        logits = torch.where(rows[..., None], logits, 0)
    *how, keep_mask = transform
    z = _transformed(torch.where(logits == -torch.inf, logits.detach(), logits), *how)
    if keep_mask is not None:
        z = torch.where(keep_mask if rows is None else keep_mask | ~rows[..., None], z, -torch.inf)
    return z + torch.where(z == torch.inf, torch.nan, 0)


def head_logits(head: HeadInputs) -> Tensor:
    """All logits of a head, of rows whose ids are ignored those of zeros, [N, V]."""
    return _head_logits(head.hidden, head.weight, head.bias, head.ids, head.compute_dtype)


def _head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, compute_dtype: str) -> Tensor:
    dtype = getattr(torch, compute_dtype)
    hidden = torch.where((ids != -100).any(-1, keepdim=True), hidden, 0).to(dtype)
    return linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))


@ranged
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, temperatures: Tensor | None,
    softcap: float, logit_scale: float, keep_mask: Tensor | None, compute_dtype: str, memory_budget: int,
    outputs: list[str], main_grad: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's results, by way of all logits."""
    logits = _head_logits(hidden, weight, bias, ids, compute_dtype)
    return token_logprobs(
        logits, ids, temperature, temperatures, softcap, logit_scale, keep_mask, outputs, inplace_backward=False
    )


def _order(logits: Tensor, ids: Tensor, keep_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(is_top1, rank): the id is the first maximum; 1 + how many logits are above the id's."""
    used = ids != -100
    x = logits if keep_mask is None else torch.where(keep_mask, logits, -torch.inf)
    own = x.gather(-1, torch.where(used, ids, 0))
    above = torch.stack([(x > own[..., k : k + 1]).sum(-1) for k in range(ids.shape[-1])], -1)
    return used & (x.argmax(-1, keepdim=True) == ids), torch.where(used, 1 + above, 0)
