"""Cross entropy as a policy gradient whose rewards are shaped: "Diversity or Precision".

    values = reward_shaped_nll(logits, ids, beta=-0.25, row_mask=mask)         # or linear_reward_shaped_nll
    loss = tokenrl.group_aggregate(values, "token-mean", mask=mask)

One step, its action the next token, its expected reward sum_v p_v R_v with R constant:

    R_id = (1 - p_id)^beta / p_id           reading "focal"
         = (1 / p_id)^((1 - p_id)^beta)     reading "power", of another account of the paper
    R_v = lam_top of the other of the k likeliest tokens, lam_tail of the rest

    d / d z_v = -p_v (R_v - sum_u p_u R_u)          exact, over the whole vocabulary, by k + 1 log-probs

beta 0 is cross entropy by either reading; below 0 mass is drawn together ("precision"), above it stays spread. Tried
were beta -0.25, 0, 0.5; lam_tail -0.1; lam_top 0.1; with k 100.

Source: arXiv 2512.22955 (two accounts of it, which differ in R_id).
"""

from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_integers, check_name, check_number, check_tensor
from ..errors import wrong
from ..logprobs.from_hidden import linear_token_logprobs
from ..logprobs.from_logits import IGNORED, token_logprobs
from ..logprobs.topk import linear_topk_ids, topk_ids

READINGS = ("focal", "power")


def reward_shaped_nll(
    logits: Tensor, ids: Tensor, *, beta: float = -0.25, lam_top: float = 0.0, lam_tail: float = 0.0, k: int = 100,
    reading: str = "focal", floor: float = 1e-6, row_mask: Tensor | None = None, temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """[N] or [B, T], fp32 (fp64 of fp64 logits), with the gradient above; 0 where row_mask or an id of -100 leaves a
    row out. Its value is -p_id R_id log p_id, the cross entropy weighed, less the expected reward of the other tokens.

    Args:
        logits: bf16, fp16, fp32 or fp64 [N, V] or [B, T, V].
        ids: integers, one per row.
        beta: of (1 - p_id), as above.
        lam_top: the reward of the other likely tokens.
        lam_tail: the reward of the rest.
        k: how many are likely, of lam_top and lam_tail, at most V; where both are 0 no list is made.
        reading: "focal" or "power".
        floor: above 0, at most 1: 1 - p_id is at least this, as (1 - p)^beta has no bound for beta < 0 (our choice).
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and are never read.
        temperature: as for token_logprobs.
        backend: as for policy_loss.
    """
    _check_ids(ids, "logits", logits)
    row = _Row(beta, lam_top, lam_tail, reading, floor)
    listed = topk_ids(logits.detach(), k, row_mask=row_mask) if row.needs_list else None
    how = {"row_mask": row_mask, "temperature": temperature, "outputs": ["logp"], "backend": backend}
    logp = token_logprobs(logits, _with_list(ids, listed), **how).logp  # type: ignore[arg-type]
    return row.values(logp, ids, listed, row_mask)


def linear_reward_shaped_nll(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, beta: float = -0.25, lam_top: float = 0.0, lam_tail: float = 0.0,
    k: int = 100, reading: str = "focal", floor: float = 1e-6, bias: Tensor | None = None,
    row_mask: Tensor | None = None, memory_budget: int | None = None, **head: Any,
) -> Tensor:  # fmt: skip
    """reward_shaped_nll of the logits hidden @ weight^T + bias, which are not held; 8 N D V flops, 2 more for a list.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [V, D].
        ids: integers, one per row.
        beta: as for reward_shaped_nll, and so are all up to floor.
        lam_top: a number.
        lam_tail: a number.
        k: at most V.
        reading: "focal" or "power".
        floor: above 0, at most 1.
        bias: [V].
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and enter no GEMM.
        memory_budget: as for linear_token_logprobs.
        head: temperature, main_grad and the like of linear_token_logprobs; with a list no keep_mask, which it would not
            see.
    """
    _check_ids(ids, "hidden", hidden)
    row = _Row(beta, lam_top, lam_tail, reading, floor)
    listed = None
    if row.needs_list:
        if head.get("keep_mask") is not None:
            raise wrong("keep_mask", "one", "None beside lam_top or lam_tail: the list is of the whole vocabulary")
        frozen = [x if x is None else x.detach() for x in (hidden, weight, bias)]
        listed = linear_topk_ids(
            frozen[0], frozen[1], k, bias=frozen[2], row_mask=row_mask, memory_budget=memory_budget  # type: ignore[arg-type]
        )  # fmt: skip
    logp = linear_token_logprobs(
        hidden, weight, _with_list(ids, listed), bias=bias, row_mask=row_mask, outputs=["logp"],
        memory_budget=memory_budget, **head,
    ).logp  # fmt: skip
    return row.values(logp, ids, listed, row_mask)


class _Row:
    """The numbers of a call, checked."""

    def __init__(self, beta: float, lam_top: float, lam_tail: float, reading: str, floor: float):
        for name, value in (("beta", beta), ("lam_top", lam_top), ("lam_tail", lam_tail)):
            check_number(name, value)
        check_name("reading", reading, READINGS)
        check_number("floor", floor, 0, 1, above=0)
        self.beta, self.lam_top, self.lam_tail, self.reading, self.floor = beta, lam_top, lam_tail, reading, floor

    @property
    def needs_list(self) -> bool:
        return self.lam_top != 0 or self.lam_tail != 0

    def values(self, logp: Tensor, ids: Tensor, listed: Tensor | None, row_mask: Tensor | None) -> Tensor:
        """logp: of the id, and of those that are listed, [.., 1 + k]."""
        wide, read = logp.double(), ids != IGNORED
        read = read if row_mask is None else read & row_mask
        own = wide[..., 0]
        loss = -self.weight(own.detach()) * own
        if listed is not None:
            p, mass = own.exp(), wide[..., 1:].exp().sum(-1)
            among = (listed == ids[..., None]).any(-1)
            top, tail = mass - torch.where(among, p, 0), 1 - mass - torch.where(among, 0, p)
            loss = loss - self.lam_top * top - self.lam_tail * tail
        return torch.where(read, loss, 0).to(logp.dtype)

    def weight(self, logp: Tensor) -> Tensor:
        """p_id R_id, finite where p_id underflows."""
        power = (-logp.expm1()).clamp(min=self.floor) ** self.beta
        return power if self.reading == "focal" else (logp * (1 - power)).exp()


def _check_ids(ids: Tensor, name: str, rows: Tensor) -> None:
    check_integers("ids", ids)
    check_tensor(name, rows)
    if ids.shape != rows.shape[:-1]:
        raise wrong("ids", f"shape {list(ids.shape)}", f"one id per row, {list(rows.shape[:-1])}")


def _with_list(ids: Tensor, listed: Tensor | None) -> Tensor:
    """[.., 1 + k]; where an id is ignored, so is its list, as its row may hold anything."""
    if listed is None:
        return ids[..., None]
    own = ids[..., None].to(listed.dtype)
    return torch.cat([own, torch.where(own == IGNORED, IGNORED, listed)], -1)
