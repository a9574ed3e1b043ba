"""Supervised warm-up, then reinforcement with verifiable rewards: several updates per batch, so ratios matter."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import tokenrl

from . import task
from .model import response_logits, sample


@dataclass(frozen=True)
class Settings:
    """steps: batches of rollouts; each is `prompts` groups of `rollouts`, used in `epochs` x `minibatches` updates.
    warm_up_reward: the sampled reward at which the warm-up stops, at the latest after warm_up_steps."""

    seed: int = 0
    steps: int = 40
    prompts: int = 48
    rollouts: int = 8
    minibatches: int = 4
    epochs: int = 2
    learning_rate: float = 2e-4
    temperature: float = 1.0
    warm_up_reward: float = 0.25
    warm_up_steps: int = 400
    warm_up_batch: int = 128
    warm_up_learning_rate: float = 3e-3
    held_out: int = 512


@dataclass(frozen=True)
class Rollouts:
    """tokens int64 [B, P + T]; ids int64 [B, T], -100 where mask (bool) is false; old_logp fp32 [B, T]; others [B]."""

    tokens: Tensor
    ids: Tensor
    mask: Tensor
    old_logp: Tensor
    rewards: Tensor
    advantages: Tensor
    group_ids: Tensor

    def __getitem__(self, rows: Tensor) -> "Rollouts":
        return Rollouts(**{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Recording:
    """A step's rollouts, and the policy's logits fp32 [B, T, V] on them after the step's updates; all on one device."""

    batch: Rollouts
    logits: Tensor
    temperature: float
    step: int


@dataclass
class History:
    """What a run saw. rewards: mean per step. clips: low, high, dual per update. statistics: the log ratios,
    nan where masked; clipped: whether a bound was active on the token; both [b, T], one entry per update."""

    rewards: list[float] = field(default_factory=list)
    clips: list[tuple[float, float, float]] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)


def graded(terms: list[task.Terms], responses: Tensor) -> Tensor:
    """Rewards, fp32 [B]."""
    texts = task.decode(responses)
    return torch.tensor([task.reward(*pair) for pair in zip(terms, texts, strict=True)], device=responses.device)


def evaluate(model: LlamaForCausalLM, settings: Settings, greedy: bool = False) -> float:
    """Mean reward on held-out problems, one response each."""
    terms = task.problems(settings.held_out, random.Random(settings.seed), evaluation=True)
    prompts = task.encode([task.prompt(t) for t in terms], task.PROMPT_LENGTH).to(model.device)
    generator = None if greedy else torch.Generator(model.device).manual_seed(settings.seed)
    return graded(terms, sample(model, prompts, settings.temperature, generator)[0]).mean().item()


def warm_up(model: LlamaForCausalLM, settings: Settings, on_step: Callable[[int, float], None]) -> int:
    """Supervised learning of worked solutions until the sampled reward is warm_up_reward; the number of updates."""
    source = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.warm_up_learning_rate)
    reward = 0.0
    for step in range(settings.warm_up_steps):
        if step % 10 == 0:
            reward = evaluate(model, settings)
            if reward >= settings.warm_up_reward:
                return step
        terms = task.problems(settings.warm_up_batch, source)
        prompts = task.encode([task.prompt(t) for t in terms], task.PROMPT_LENGTH)
        responses = task.encode([task.solution(t) for t in terms], task.RESPONSE_LENGTH)
        tokens = torch.cat([prompts, responses], 1).to(model.device)
        mask = (responses != task.BLANK).to(model.device)
        ids = torch.where(mask, tokens[:, task.PROMPT_LENGTH :], -100)
        (logp,) = tokenrl.token_logprobs(response_logits(model, tokens), ids, outputs=("logp",))
        _update(model, optimizer, -logp.sum() / mask.sum())
        on_step(step + 1, reward)
    return settings.warm_up_steps


def collect(
    model: LlamaForCausalLM, terms: list[task.Terms], settings: Settings, generator: torch.Generator
) -> Rollouts:
    """settings.rollouts responses to each problem, their log-probs when sampled, and group-normalised advantages."""
    repeated = [t for t in terms for _ in range(settings.rollouts)]
    prompts = task.encode([task.prompt(t) for t in repeated], task.PROMPT_LENGTH).to(model.device)
    responses, mask = sample(model, prompts, settings.temperature, generator)
    tokens, ids = torch.cat([prompts, responses], 1), torch.where(mask, responses, -100)
    with torch.no_grad():
        old_logp = tokenrl.token_logprobs(
            response_logits(model, tokens), ids, temperature=settings.temperature, outputs=("logp",)
        ).logp
    rewards = graded(repeated, responses)
    groups = rewards.view(-1, settings.rollouts)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    group_ids = torch.arange(len(repeated), device=model.device) // settings.rollouts
    return Rollouts(tokens, ids, mask, old_logp, rewards, advantages.flatten(), group_ids)


def reinforce(
    start: LlamaForCausalLM, name: str, settings: Settings, on_step: Callable[[int, float], None]
) -> tuple[LlamaForCausalLM, History, Recording]:
    """A copy of `start` trained with an objective; its history; a step a quarter through, when rewards are mixed."""
    model = copy.deepcopy(start)
    objective = tokenrl.objective(name)
    source = random.Random(settings.seed + 1)
    generator = torch.Generator(model.device).manual_seed(settings.seed + 1)
    shuffle = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    history = History()
    for step in range(settings.steps):
        batch = collect(model, task.problems(settings.prompts, source), settings, generator)
        for _ in range(settings.epochs):
            order = torch.randperm(len(batch.tokens), generator=shuffle).to(model.device)
            for rows in order.chunk(settings.minibatches):
                _improve(model, optimizer, objective, batch[rows], settings.temperature, history)
        if step == settings.steps // 4:
            with torch.no_grad():
                logits = response_logits(model, batch.tokens).clone()
            recording = Recording(batch, logits, settings.temperature, step + 1)
        history.rewards.append(batch.rewards.mean().item())
        on_step(step + 1, history.rewards[-1])
    return model, history, recording


def _improve(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, objective: tokenrl.Objective, batch: Rollouts,
    temperature: float, history: History,
) -> None:  # fmt: skip
    logits = response_logits(model, batch.tokens)
    (logp,) = tokenrl.token_logprobs(logits, batch.ids, temperature=temperature, outputs=("logp",))
    loss, metrics = tokenrl.policy_loss(objective, logp, batch.old_logp, batch.advantages, mask=batch.mask)
    _update(model, optimizer, loss)
    history.clips.append((metrics.clip_low, metrics.clip_high, metrics.clip_dual))
    s, clipped = decisions(objective, logp.detach(), batch)
    history.statistics.append(s.cpu())
    history.clipped.append(clipped.cpu())


def _update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def decisions(objective: tokenrl.Objective, logp: Tensor, batch: Rollouts) -> tuple[Tensor, Tensor]:
    """(s, clipped), [B, T]: the objective's log ratio, nan where masked, and whether a bound is active."""
    s = x = logp - batch.old_logp
    if objective.statistic != "token":
        kind = objective.statistic.removeprefix("prefix_")
        s = tokenrl.prefix_ratio(logp, batch.old_logp.to(logp.dtype), mask=batch.mask, kind=kind)
    t = batch.mask.cumsum(1).to(s.dtype)
    low, high, dual = objective.gate.clipped(s, x, logp, batch.advantages[:, None], t)
    return torch.where(batch.mask, s, torch.nan), (low | high | dual) & batch.mask
