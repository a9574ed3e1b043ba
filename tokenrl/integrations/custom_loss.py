"""A custom loss of slime and of miles, its fork: tokenrl's objective inside the host's own policy loss, whose
log-probs, corrections of the rollout, KL and entropy terms and metrics stay the host's."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import wrong
from ..losses.policy import policy_loss
from ..losses.token_metrics import token_metrics
from ..objectives.policy import Objective, objective
from .hosts import PPO, chosen_objective, clip_fraction

Loss = tuple[Tensor, dict[str, Tensor]]
LOG_PROBS, PER_TOKEN = "get_log_probs_and_entropy", ("compute_policy_loss", "compute_cispo_loss")


def row_of(host: str, args: Any, clamp: float) -> Objective:
    """clamp: the host's, of a token's log ratio."""
    bounds = {"eps_low": args.eps_clip, "eps_high": args.eps_clip_high, "clamp": clamp}
    ppo = bounds | {"dual": getattr(args, "eps_clip_c", None) or math.inf}
    settings = dict.fromkeys(PPO, ppo)
    settings |= {"gspo": ppo | {"clamp": math.inf}, "cispo": bounds | {"bound": "relative"}}
    own = args.advantage_estimator if args.advantage_estimator in ("gspo", "cispo") else "ppo"
    return chosen_objective(host, settings) or objective(own, **settings[own])


@contextmanager
def around(module: Any) -> Iterator[dict[str, Any]]:
    """Within, the host's loss of each token is a probe of zeros, whose derivative is the token's weight."""
    found: dict[str, Any] = {}
    before = {name: getattr(module, name) for name in (LOG_PROBS, *PER_TOKEN) if hasattr(module, name)}
    stack = ExitStack()

    def log_probs(*args: Any, **kwargs: Any) -> Any:
        out = before[LOG_PROBS](*args, **kwargs)
        found["logps"] = (out[1] if isinstance(out, tuple) else out)["log_probs"]
        return out

    def probe(ppo_kl: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # From here on tensors hold a number per token: under a checkpoint too they are kept, and differentiated.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
        found["probe"] = torch.zeros_like(ppo_kl, requires_grad=True)
        return found["probe"], torch.zeros_like(ppo_kl)

    for name in before:
        setattr(module, name, log_probs if name == LOG_PROBS else probe)
    try:
        with stack:
            yield found
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def evaluate(
    row: Objective, module: Any, args: Any, batch: Any, logits: Tensor, mean: Callable[[Tensor], Tensor]
) -> Loss:
    """(loss, metrics), 0-d: sums over the samples of a micro-batch. module: of the host's policy_loss_function; the
    others are what the host hands to a custom loss."""
    with around(module) as found:
        rest, reported = module.policy_loss_function(args, batch, logits, mean)
        weight = torch.autograd.grad(rest, found["probe"], retain_graph=True)[0]
    rest = rest if torch.is_grad_enabled() else rest.detach()
    logps, lengths = list(found["logps"]), [len(x) for x in found["logps"]]
    if not sum(lengths):
        return rest, reported
    if lengths == list(batch["response_lengths"]):
        mask = torch.cat(list(batch["loss_masks"])).to(weight.device) > 0
    elif row.statistic == "token" and row.form is None:  # of which a token of weight 0 is no part either way
        mask = weight != 0
    else:
        raise wrong("objective", f"{row.name!r} under context parallelism", "a row of single tokens, or no such parts")
    logp, advantages = torch.cat(logps), torch.cat(list(batch["advantages"])).detach()
    sampled = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(list(sampled)).detach() if sampled else None
    shape: dict[str, Any] = {"mask": mask, "advantages_per": "token"}
    shape["cu_seqlens"] = torch.tensor([0, *lengths], device=weight.device).cumsum(0)
    loss, metrics = policy_loss(row, logp, old, advantages, token_weight=weight, aggregation="token-sum", **shape)
    if row.form is None:
        tokens = token_metrics(row, logp, old, advantages, **shape)
        clipped = (tokens.clip_low | tokens.clip_high).to(logp.dtype)
    else:
        clipped = clip_fraction(metrics).to(logp.dtype).expand_as(logp)
    total = loss + rest
    ours = {"loss": total, "pg_loss": loss, "pg_clipfrac": mean(clipped)}
    return total, reported | {name: x.detach().clone() for name, x in ours.items()}
