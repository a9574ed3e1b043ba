"""head="one-pass": TRL's loss straight from hidden states, inside the model's forward, where its head would run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...losses.linear_policy import linear_policy_loss
from ...objectives.policy import Objective
from .loss import policy_inputs, ratio_holds_rollout, terms_of, weighting

_current: list["OnePass"] = []  # the one whose forward runs


@dataclass
class OnePass:
    """One call of _compute_loss; loss and metrics are there after the forward. mask: bool [B, T], tools' output left
    out. sharded: the model is FSDP2's, which hooks what a forward returns, so the loss has to leave it there: the
    log-probs carry its gradient."""

    trainer: Any
    inputs: dict[str, Any]
    mask: Tensor
    row: Objective
    sharded: bool = False
    loss: Tensor = field(init=False)
    metrics: Any = field(init=False)

    def apply(self, hidden: Tensor, weight: Tensor, ids: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) of the completions' tokens, packed as TRL packs them: hidden [N, D], ids [N]."""
        there = self.inputs["completion_mask"].bool()
        at = torch.nonzero_static(there.flatten(), size=len(ids))[:, 0]  # with their number known, no host sync

        def packed(x: Any) -> Any:
            return x.expand_as(there).reshape(-1)[at] if isinstance(x, Tensor) and x.dim() == 2 else x

        given = policy_inputs(self.trainer, self.inputs, self.row)
        how = weighting(self.trainer, self.inputs, self.mask)
        terms = terms_of(self.trainer, self.inputs, self.mask, None, how, given["token_weight"] is None)
        per = "token" if given["advantages"].dim() == 2 else "sequence"
        per_token = {name: packed(x) for name, x in (given | how | terms).items()}
        boundaries = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0))
        self.loss, self.metrics = linear_policy_loss(
            self.row, hidden, weight, ids, cu_seqlens=boundaries, advantages_per=per, without_advantage="compute",
            **per_token, **head,
        )  # fmt: skip
        logp = self.metrics.logp
        if self.sharded:
            logp = logp + (self.loss - self.loss.detach())
        return logp, self.metrics.token_entropy

    def loss_through(self, logp: Tensor) -> Tensor:
        """The loss with its gradient; logp: [B, T], what the forward returned."""
        if not self.sharded:
            return self.loss
        first = self.inputs["completion_mask"].flatten().argmax()  # without a token there is no gradient either
        carried = logp.flatten().index_select(0, first[None])[0]
        return self.loss.detach() + (carried - carried.detach())


def running() -> OnePass | None:
    return _current[-1] if _current else None


@contextmanager
def inside(one_pass: OnePass) -> Iterator[None]:
    """The next head of the trainer is this."""
    _current.append(one_pass)
    try:
        yield
    finally:
        _current.pop()


def what_prevents(trainer: Any, row: Objective) -> str | None:
    """The setting under which one pass has not TRL's numbers, None if there is none."""
    settings = {
        f"beta and loss_type={trainer.loss_type!r} of vLLM's rollouts": (
            trainer.beta != 0.0 and trainer.args.use_bias_correction_kl and ratio_holds_rollout(trainer, row)
        ),
        "top_entropy_quantile": trainer.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": trainer.off_policy_mask_threshold is not None,
        "router_aux_loss_coef": trainer.aux_loss_enabled,
        f"objective={row.name!r}": row.form is not None,
    }
    return next((name for name, prevents in settings.items() if prevents), None)
