"""Divergence of two policies on the top-K tokens of the one that sampled, for the masks of DPPO and CPPO. Of a student
and its teacher, with gradient: tokenrl.topk_token_divergence."""

from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_integers, check_name, check_tensor
from ..batch.layout import layout_of
from ..batch.valid_tokens import ValidTokens, valid_tokens
from ..errors import wrong

KINDS = ("tv", "kl")
FLOOR = 1e-8


def topk_divergence(
    logp_topk: Tensor,
    old_logp_topk: Tensor,
    *,
    kind: str = "tv",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ids_topk: Tensor | None = None,
    ids: Tensor | None = None,
    logp: Tensor | None = None,
    old_logp: Tensor | None = None,
) -> Tensor:
    """Divergence of mu = exp(old_logp) and p = exp(logp) per token, over K buckets of one id and one of the others:
    [B, T, K] -> [B, T], or [N, K] -> [N] with cu_seqlens; the dtype of logp_topk. No gradient.

        "tv"    1/2 sum_b |p_b - mu_b|
        "kl"    sum_b mu_b (log mu_b - log p_b), for the bucket of the others with 1e-8 added inside both logarithms

    At most the divergence over the whole vocabulary, equal to it if K = V (up to that 1e-8), and growing with K. Of one
    bucket, the sampled token, it is DPPO's binary divergence, whose code has the 1e-8 there. Where the K have a
    probability of 1, or above by rounding, the others have 0.

    Args:
        logp_topk: fp32 or fp64 [B, T, K], or [N, K] with cu_seqlens, K >= 1, of K distinct ids, the most likely ones of
            the policy that sampled (K = 20). -inf is an id of probability 0; mu > 0 where p = 0 has an infinite KL.
        old_logp_topk: of that shape, of the same ids under the policy that sampled.
        kind: "tv" or "kl".
        mask: policy_loss's, bool [B, T] or [N]: masked cells may hold anything and give 0.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        ids_topk: integers, the K ids; with ids, logp and old_logp the sampled token is a bucket of its own where it is
            not among the K (CPPO). All four or none.
        ids: integers [B, T] or [N], the sampled ones.
        logp: fp32 or fp64, theirs.
        old_logp: likewise, under the policy that sampled.

    Source: DPPO, arXiv 2602.04879 (paper; the 1e-8: authors' code); CPPO, arXiv 2606.10968 (paper).
    """
    check_name("kind", kind, KINDS)
    valid = _as_valid_tokens(logp_topk, old_logp_topk, mask, cu_seqlens)
    x, y = (t.reshape(-1, t.shape[-1])[valid.cells].double() for t in (logp_topk, old_logp_topk))
    sampled: dict[str, Any] = {"ids_topk": ids_topk, "ids": ids, "logp": logp, "old_logp": old_logp}
    missing = [name for name, t in sampled.items() if t is None]
    if len(missing) < len(sampled):
        if missing:
            raise wrong(missing[0], None, "all of ids_topk, ids, logp, old_logp, or none")
        x, y = _with_sampled(valid, x, y, **sampled)
    p, mu = x.exp(), y.exp()
    rest, rest_mu = ((1 - t.sum(-1)).clamp(min=0) for t in (p, mu))
    if kind == "tv":
        found = 0.5 * ((p - mu).abs().sum(-1) + (rest - rest_mu).abs())
    else:
        found = torch.where(mu > 0, mu * (y - x), 0.0).sum(-1)
        found = found + rest_mu * ((rest_mu + FLOOR).log() - (rest + FLOOR).log())
    return valid.put(found, logp_topk.dtype)


def _as_valid_tokens(
    logp_topk: Tensor, old_logp_topk: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> ValidTokens:
    dims = "[B, T, K]" if cu_seqlens is None else "[N, K] with cu_seqlens"
    for name, x in (("logp_topk", logp_topk), ("old_logp_topk", old_logp_topk)):
        check_tensor(name, x)
        if x.dim() != (3 if cu_seqlens is None else 2) or x.shape[-1] == 0:
            raise wrong(name, f"shape {list(x.shape)}", f"{dims}, K >= 1")
        check_floats(name, x)
        check_constant(name, x)
    if old_logp_topk.shape != logp_topk.shape or old_logp_topk.device != logp_topk.device:
        given = f"shape {list(old_logp_topk.shape)} on {old_logp_topk.device}"
        raise wrong("old_logp_topk", given, f"that of logp_topk, {list(logp_topk.shape)} on {logp_topk.device}")
    return valid_tokens(layout_of(logp_topk[..., 0], mask=mask, cu_seqlens=cu_seqlens, name="logp_topk"))


def _with_sampled(
    valid: ValidTokens, x: Tensor, y: Tensor, ids_topk: Tensor, ids: Tensor, logp: Tensor, old_logp: Tensor
) -> tuple[Tensor, ...]:
    """Both log-probs with a bucket more, of probability 0 where the sampled token is among the K."""
    check_integers("ids", ids)
    check_integers("ids_topk", ids_topk)
    shape = (*valid.layout.shape, x.shape[-1])
    if ids_topk.shape != shape or ids_topk.device != x.device:
        raise wrong("ids_topk", f"shape {list(ids_topk.shape)} on {ids_topk.device}", f"{list(shape)} on {x.device}")
    own = valid.layout.flat_tokens("ids", ids)[valid.cells]
    among = (ids_topk.reshape(-1, x.shape[-1])[valid.cells] == own[:, None]).any(-1)
    more = (torch.where(among, -torch.inf, valid.take(n, t)) for n, t in (("logp", logp), ("old_logp", old_logp)))
    return tuple(torch.cat([known, t[:, None]], -1) for known, t in zip((x, y), more, strict=True))
