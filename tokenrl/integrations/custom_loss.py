"""A custom loss of slime and of miles, its fork: tokenrl's objective inside the host's own policy loss, whose
log-probs, corrections of the rollout, KL and entropy terms and metrics stay the host's."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..errors import wrong
from ..losses.policy import policy_loss
from ..losses.token_metrics import token_metrics
from ..objectives.policy import Objective, objective
from .hosts import PPO, chosen_objective, clip_fraction

if TYPE_CHECKING:
    from ..distributed import ContextShard

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
    logps = list(found["logps"])
    context = None if of_single_tokens(row) else context_of(module, args, batch)
    if context is None and not sum(map(len, logps)):
        return rest, reported
    tokens = tokens_of(row, args, batch, logps, weight)
    loss, clipped = _policy_term(row, tokens) if context is None else _of_context(row, tokens, batch, context)
    total = loss + rest
    ours = {"loss": total, "pg_loss": loss, "pg_clipfrac": mean(clipped)}
    return total, reported | {name: x.detach().clone() for name, x in ours.items()}


@dataclass(frozen=True)
class Tokens:
    """Of the responses of a micro-batch, one after the other; lengths: of each."""

    logp: Tensor
    old_logp: Tensor | None
    advantages: Tensor
    weight: Tensor
    mask: Tensor | None
    lengths: list[int]


def of_single_tokens(row: Objective) -> bool:
    """Whether a token of weight 0 is no part of others' losses."""
    return row.statistic == "token" and row.form is None


def tokens_of(row: Objective, args: Any, batch: Any, logps: list[Tensor], weight: Tensor) -> Tokens:
    """This rank's; mask: None where those of the host are not of these tokens."""
    lengths = [len(x) for x in logps]
    sampled = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    old = torch.cat(list(sampled)).detach() if sampled else None
    mask = None
    if lengths == list(batch["response_lengths"]):
        mask = torch.cat(list(batch["loss_masks"])).to(weight.device) > 0
    elif of_single_tokens(row):
        mask = weight != 0
    return Tokens(torch.cat(logps), old, torch.cat(list(batch["advantages"])).detach(), weight, mask, lengths)


def _policy_term(row: Objective, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(the sum of the weighted losses; of each token, whether its clip is active)."""
    if tokens.mask is None:
        raise wrong("objective", f"{row.name!r} under context parallelism", "a row of single tokens, or no such parts")
    ends = torch.tensor([0, *tokens.lengths], device=tokens.weight.device).cumsum(0)
    shape: dict[str, Any] = {"mask": tokens.mask, "advantages_per": "token", "cu_seqlens": ends}
    given = (tokens.logp, tokens.old_logp, tokens.advantages)
    loss, metrics = policy_loss(row, *given, token_weight=tokens.weight, aggregation="token-sum", **shape)
    if row.form is None:
        found = token_metrics(row, *given, **shape)
        return loss, (found.clip_low | found.clip_high).to(tokens.logp.dtype)
    return loss, clip_fraction(metrics).to(tokens.logp.dtype).expand_as(tokens.logp)


def context_of(module: Any, args: Any, batch: Any) -> "ContextShard | None":
    """Which tokens of the responses each rank of the host's context-parallel group holds, in a zig-zag per sequence;
    None without such ranks. Where a rank holds others, the exchange says so on all of them."""
    group = _context_group(module)
    if group is None or group.size() == 1:
        return None
    from ..distributed import ContextShard

    lengths = list(batch["response_lengths"])
    widths = batch.get("max_seq_lens") if getattr(args, "qkv_format", "thd") != "thd" else None
    pieces = [
        _pieces(rank, group.size(), list(batch["total_lengths"]), lengths, widths) for rank in range(group.size())
    ]
    return ContextShard(group, torch.tensor([0, *lengths]).cumsum(0), pieces)


def _context_group(module: Any) -> Any:
    """slime asks Megatron for it, miles its own state."""
    if hasattr(module, "mpu"):
        return module.mpu.get_context_parallel_group()
    if hasattr(module, "get_parallel_state"):
        return module.get_parallel_state().cp.group
    return None


def _pieces(
    rank: int, world: int, totals: list[int], lengths: list[int], widths: list[int] | None
) -> list[tuple[int, int]]:
    """(first token, count) of a rank's parts of each response, of which the prompt's last token predicts the first. A
    sequence of a prompt and a response, or what it is padded to, lies in 2 W parts."""
    found, begin = [], 0
    for sample, (total, length) in enumerate(zip(totals, lengths, strict=True)):
        part = -(-(total if widths is None else widths[sample]) // (2 * world))
        for number in (rank, 2 * world - 1 - rank):
            first, last = max(number * part, total - length - 1), min((number + 1) * part, total - 1)
            found.append((begin + first - (total - length - 1), max(last - first, 0)))
        begin += length
    return [piece for piece in found if piece[1]]


def _of_context(row: Objective, own: Tokens, batch: Any, context: "ContextShard") -> tuple[Tensor, Tensor]:
    """As _policy_term of the whole responses, which every rank gathers in one exchange. Of the loss each has an equal
    share, as the host adds those of ranks up, and its own tokens' gradients."""
    columns = [own.logp, own.logp.detach() if own.old_logp is None else own.old_logp, own.advantages, own.weight]
    logp, old, advantages, weight = context.gathered(torch.stack([x.to(own.logp) for x in columns], -1)).unbind(-1)
    mask = torch.cat(list(batch["loss_masks"])).to(logp.device) > 0
    given = (None if own.old_logp is None else old.detach(), advantages.detach(), weight.detach())
    loss, clipped = _policy_term(row, Tokens(logp.contiguous(), *given, mask, list(batch["response_lengths"])))
    whole = loss.detach()
    return loss - whole + whole / context.group.size(), context.take(clipped)
