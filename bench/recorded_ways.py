"""Ways to compute the loss of a recorded batch: our backends, eager PyTorch, torch.compile, TRL and Liger."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tokenrl
from tokenrl.instruments.parity.head_rows import Scores, eager_scores
from tokenrl.instruments.parity.held import leaves_of
from tokenrl.instruments.rollout_batch import OF_LOSS, TRANSFORM, RolloutBatch
from tokenrl.objectives.policy import Objective

from .competitors import why_not
from .linear_competitors import trl_chunked

LIGER_LOSSES = ("grpo", "bnpo", "dapo")
LIGER_TENSORS = {
    "hidden", "weight", "bias", "ids", "logp", "old_logp", "advantages", "mask", "rewards", "group_ids", "ref_logp",
}  # fmt: skip
Loss = Callable[..., Tensor]  # of the leaves: logits, hidden states with weight and bias, or log-probs


@dataclass(frozen=True)
class Way:
    """make(batch, row) gives the loss as a function of the batch's leaves; None where there is a reason."""

    name: str
    make: Callable[[RolloutBatch, Objective], Loss] | None
    reason: str | None = None
    ours: bool = False


def with_tensors(batch: RolloutBatch, leaves: Sequence[Tensor]) -> RolloutBatch:
    return RolloutBatch(
        {**batch.tensors, **dict(zip(leaves_of(batch), leaves, strict=True))}, batch.objective, batch.settings, {}
    )


def two_ops(backend: str, batch: RolloutBatch, row: Objective) -> Loss:
    """The log-probs of the tokens that count, and the loss of them."""

    def loss(*leaves: Tensor) -> Tensor:
        given = with_tensors(batch, leaves)
        logp, entropy = given.scored(backend, row_mask=batch.tensors.get("mask"))
        return given.loss(row, logp=logp, entropy=entropy, backend=backend)[0]

    return loss


def one_op(backend: str, batch: RolloutBatch, row: Objective) -> Loss:
    """From hidden states at once."""
    names = tuple(name for name in OF_LOSS if name not in ("old_logp", "advantages"))
    given = batch.arguments(TRANSFORM + names)
    ids, old, advantages = (batch.tensors.get(name) for name in ("ids", "old_logp", "advantages"))

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found, _ = tokenrl.linear_policy_loss(
            row, hidden, weight, ids, old, advantages, bias=bias, backend=backend, **given
        )
        return found

    return loss


def of_scores(scores: Callable[..., Scores], batch: RolloutBatch, row: Objective) -> Loss:
    """A head of others, and the loss of its log-probs on the reference, which is plain torch."""

    def loss(*leaves: Tensor) -> Tensor:
        logp, entropy = scores(batch, *leaves)
        return batch.loss(row, logp=logp, entropy=entropy, backend="reference")[0]

    return loss


def trl_scores(batch: RolloutBatch, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Scores:
    """By TRL's functions: of logits or, in chunks, of hidden states."""
    ids, how = batch.tensors["ids"].clamp(min=0), batch.arguments(TRANSFORM)
    wanted = ("entropy",) * batch.entropy_of_head
    if weight is not None:
        logp, *more = trl_chunked(x.reshape(-1, x.shape[-1]), weight, ids.flatten(), wanted, bias=bias, **how)
        return logp.view(ids.shape), more[0].view(ids.shape) if wanted else None
    from trl.trainer.utils import selective_log_softmax_and_entropy

    rows = (x, ids) if ids.dim() == 2 else (x[None], ids[None])
    logp, entropy = selective_log_softmax_and_entropy(*rows, **how, entropy_requires_grad=bool(wanted))
    return logp.view(ids.shape), entropy.view(ids.shape) if wanted else None


def trl(batch: RolloutBatch) -> Way:
    how, reason = batch.arguments(TRANSFORM), None
    if batch.leaf == "logp":
        reason = "its head starts from logits or hidden states; this batch has log-probs alone"
    elif "keep_mask" in how or isinstance(how.get("temperature"), Tensor):
        reason = "its head takes no keep_mask and one temperature"
    elif batch.leaf == "logits" and how.keys() & {"softcap", "logit_scale"}:
        reason = "its function of logits takes no softcap and no logit_scale"
    elif batch.leaf == "logits":
        reason = why_not("trl", "1.16.0", "trl.trainer.utils", "selective_log_softmax_and_entropy")
    else:
        reason = why_not("trl", "1.16.0", "trl.kernels", "ChunkedLogProbFunction")
    return Way("TRL", None if reason else partial(of_scores, trl_scores), reason)


def liger_loss(batch: RolloutBatch, row: Objective) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    given, gate = batch.tensors, row.gate
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type=row.name, epsilon_low=gate.eps_low,
        epsilon_high=gate.eps_high, temperature=batch.settings.get("temperature", 1.0),
    )  # fmt: skip
    mask = batch.layout.valid().view(given["ids"].shape) & (given["ids"] >= 0)
    ids, old, advantages = given["ids"].clamp(min=0), given.get("old_logp"), given["advantages"]
    return lambda hidden, weight, bias=None: loss(
        hidden, weight, ids, mask.float(), advantages, bias=bias, old_per_token_logps=old
    )[0]


def liger(batch: RolloutBatch, row: Objective) -> Way:
    more = (batch.tensors.keys() - LIGER_TENSORS) | (batch.settings.keys() - {"temperature", "advantages_per"})
    if batch.leaf != "hidden" or batch.layout.width is None:
        reason = "its loss starts from padded hidden states"
    elif row.name not in LIGER_LOSSES or any(isinstance(bound, Tensor) for bound in row.gate.params()):
        reason = f"its losses are {', '.join(LIGER_LOSSES)} with numbers as bounds, not this {row.name}"
    elif more or batch.tensors["advantages"].dim() != 1:
        reason = f"its loss takes one advantage a sequence, and no {', '.join(sorted(more)) or 'other'}"
    else:
        reason = why_not("liger-kernel", "0.8.5", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    return Way("Liger", None if reason else liger_loss, reason)


def compiled(batch: RolloutBatch, row: Objective) -> Loss:
    torch._logging.set_logs(dynamo=logging.ERROR)  # breaks of its graph are no news here
    return torch.compile(of_scores(eager_scores, batch, row), dynamic=False)


def own_ways(batch: RolloutBatch, row: Objective, backends: Sequence[str]) -> list[Way]:
    found = []
    for name in backends:
        if batch.leaf == "hidden" and "entropy" not in batch.tensors:
            found.append(Way(f"{name}, linear_policy_loss", partial(one_op, name), ours=True))
        head = {"hidden": ", linear_token_logprobs", "logits": ", token_logprobs"}.get(batch.leaf, "")
        found.append(Way(f"{name}{head}", partial(two_ops, name), ours=True))
    return found


def ways(batch: RolloutBatch, row: Objective, backends: Sequence[str], compile: bool) -> list[Way]:
    """Ours first, and what we would rather be measured with."""
    found = [*own_ways(batch, row, backends), Way("eager", partial(of_scores, eager_scores))]
    found.append(Way("compile", compiled if compile else None, None if compile else "--no-compile"))
    return [*found, trl(batch), liger(batch, row)]
