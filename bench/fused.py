"""Gates retyped in plain torch and fused by tokenrl.fuse, beside the built-in gates of the same formulas.

On the CPU backend in processor time of one thread: forward and backward of policy_loss, in turns.
"""

from collections.abc import Callable
from dataclasses import replace
from time import thread_time

import torch
from torch import Tensor

import tokenrl
from tokenrl.ops import backends

ROWS, WIDTH, ROUNDS = 64, 1024, 25  # of each call the fastest round counts


def clipped_loss(advantages, r, low, high):
    return torch.maximum(-advantages * r, -advantages * torch.clamp(r, low, high))


@tokenrl.parametrised
class PlainPpo(tokenrl.Gate):
    name = "plain_ppo"
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual: float = torch.inf

    def value(self, s, x, logp, advantages, t):
        loss = clipped_loss(advantages, s.exp(), 1 - self.eps_low, 1 + self.eps_high)
        return torch.where(advantages < 0, torch.minimum(loss, -advantages * self.dual), loss)

    def clipped(self, s, x, logp, advantages, t):
        r, down = s.exp(), advantages < 0
        return down & (r < 1 - self.eps_low), (advantages > 0) & (r > 1 + self.eps_high), down & (r > self.dual)


@tokenrl.parametrised
class PlainBand(tokenrl.Gate):
    name = "plain_band"
    eps_low: float = 0.025
    eps_high: float = 0.05
    eps_dual: float = 0.05
    power: float = 0.5

    def value(self, s, x, logp, advantages, t):
        width = t**self.power
        upper = torch.where(advantages > 0, self.eps_high * width, self.eps_dual * width)
        lower = torch.where(advantages > 0, -torch.inf, -self.eps_low * width)
        return -advantages * s.clamp(lower, upper).exp()

    def clipped(self, s, x, logp, advantages, t):
        width, down = t**self.power, advantages < 0
        low, high = s < -self.eps_low * width, s > self.eps_high * width
        return down & low, (advantages > 0) & high, down & (s > self.eps_dual * width)


@tokenrl.parametrised
class PlainSapo(tokenrl.Gate):
    name = "plain_sapo"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def value(self, s, x, logp, advantages, t):
        tau = torch.where(advantages > 0, self.tau_pos, self.tau_neg)
        return -4 / tau * torch.sigmoid(tau * (s.exp() - 1)) * advantages


@tokenrl.parametrised
class PlainCispo(tokenrl.Gate):
    name = "plain_cispo"
    slopes = ("logp",)
    eps_low: float = 0.0
    eps_high: float = 5.0

    def value(self, s, x, logp, advantages, t):
        return -advantages * s.exp().clamp(self.eps_low, self.eps_high).detach() * logp

    def clipped(self, s, x, logp, advantages, t):
        return s.exp() < self.eps_low, s.exp() > self.eps_high, torch.zeros_like(s, dtype=torch.bool)


PLAIN = {"dapo": PlainPpo(), "ctpo": PlainBand(), "sapo": PlainSapo(), "cispo": PlainCispo()}  # row -> its gate


def _step(row: tokenrl.Objective, backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(ROWS, WIDTH, generator=g)
    old = logp + 0.02 * torch.randn(ROWS, WIDTH, generator=g)
    advantages = torch.randn(ROWS, generator=g)
    logp.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss, _ = tokenrl.policy_loss(row, logp, old, advantages, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

    return step


def _nanoseconds(step: Callable[[], object]) -> float:
    begin = thread_time()
    step()
    return (thread_time() - begin) * 1e9 / (ROWS * WIDTH)


def measure() -> dict[str, dict[str, float]]:
    """Objective -> nanoseconds per token, built in, fused and on the reference; nothing where no C++ was compiled."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {}
    for name, plain in PLAIN.items():
        if plain.name not in backends.CPU_GATES:
            tokenrl.fuse(type(plain))
        if plain.name not in backends.CPU_GATES:
            continue
        row = tokenrl.objective(name)
        own = replace(row, name=plain.name, gate=plain)
        ways = {"built in": (row, "cpu"), "fused": (own, "cpu"), "reference": (own, "reference")}
        steps = {way: _step(*given) for way, given in ways.items()}
        for step in steps.values():
            step()
        rounds = [{way: _nanoseconds(step) for way, step in steps.items()} for _ in range(ROUNDS)]
        found[name] = {way: min(times[way] for times in rounds) for way in steps}
    torch.set_num_threads(threads)
    return found
