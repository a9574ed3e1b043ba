"""Gates as a user types them, and what a test needs of their kernels."""

import ctypes
import subprocess
from functools import cache

import host_build
import torch
from paths import ROOT

import tokenrl
from bench.fused import PlainBand, PlainCispo, PlainPpo, PlainSapo, clipped_loss
from tokenrl.fusion.trace import traced
from tokenrl.fusion.writing import cpp_source
from tokenrl.objectives.gates.adaptive import DhpoBranch
from tokenrl.objectives.gates.bounded import Cfpo, LogBand, PpoClip, PrimeRl, Sapo
from tokenrl.objectives.gates.kl import KlK3
from tokenrl.objectives.gates.weighted import Cispo, Quadratic


@tokenrl.parametrised
class PlainCfpo(tokenrl.Gate):
    name = "plain_cfpo"
    eps: float = 0.2

    def value(self, s, x, logp, advantages, t):
        r = torch.exp(s)
        return -advantages * r + advantages.abs() / (2 * self.eps) * (r - 1) ** 2


@tokenrl.parametrised
class PlainQuadratic(tokenrl.Gate):
    name = "plain_quadratic"
    vanishes = False
    slopes = ("s", "logp")
    beta: float = 1.0

    def value(self, s, x, logp, advantages, t):
        return -advantages * logp + self.beta / 2 * s.pow(2)


@tokenrl.parametrised
class PlainPrimeRl(tokenrl.Gate):
    name = "plain_prime_rl"
    vanishes = False
    eps_low: float = 0.02
    eps_high: float = 0.03
    eps_back: float = 0.05
    kl_tau: float = 0.3

    def _moved(self, s, logp, advantages):
        moved, up = logp.exp() - (logp - s).exp().clamp(max=1), advantages > 0
        low = moved < -torch.where(up, self.eps_back, self.eps_low)
        return low, moved > torch.where(up, self.eps_high, self.eps_back)

    def value(self, s, x, logp, advantages, t):
        low, high = self._moved(s.detach(), logp.detach(), advantages)
        return -advantages * s.exp() * (~(low | high)).to(s.dtype) + self.kl_tau * s**2

    def clipped(self, s, x, logp, advantages, t):
        return *self._moved(s, logp, advantages), torch.zeros_like(s, dtype=torch.bool)


@tokenrl.parametrised
class PlainBranches(tokenrl.Gate):
    """DHPO's, a minimum per branch."""

    name = "plain_branches"
    mix: float = 0.3
    eps_low: float = 0.2
    eps_high: float = 0.28
    span_eps_low: float = 0.1
    span_eps_high: float = 0.15

    def value(self, s, x, logp, advantages, t):
        own = clipped_loss(advantages, x.exp(), 1 - self.eps_low, 1 + self.eps_high)
        span = clipped_loss(advantages, s.exp(), 1 - self.span_eps_low, 1 + self.span_eps_high)
        return self.mix * own + (1 - self.mix) * span

    def clipped(self, s, x, logp, advantages, t):
        low = (x.exp() < 1 - self.eps_low) | (s.exp() < 1 - self.span_eps_low)
        high = (x.exp() > 1 + self.eps_high) | (s.exp() > 1 + self.span_eps_high)
        return (advantages < 0) & low, (advantages > 0) & high, torch.zeros_like(low)


@tokenrl.parametrised
class PlainK3(tokenrl.Gate):
    name = "plain_k3"
    uses_advantages = False
    ceiling: float = 0.05

    def value(self, s, x, logp, advantages, t):
        return torch.clamp(torch.expm1(-s) + s, max=self.ceiling)


@tokenrl.parametrised
class PlainK3Unbiased(PlainK3):
    """Straight through: the value of one, the slope of another."""

    name = "plain_k3_unbiased"

    def value(self, s, x, logp, advantages, t):
        carrier = s * s / 2
        return (PlainK3.value(self, s, x, logp, advantages, t) - carrier).detach() + carrier


PLAIN = {
    gate.name: (gate, built_in)
    for gate, built_in in (
        (PlainPpo(0.2, 0.28, dual=1.5), PpoClip(0.2, 0.28, dual=1.5)),
        (PlainBand(0.1, 0.15, eps_dual=0.3), LogBand(0.1, 0.15, eps_dual=0.3)),
        (PlainSapo(), Sapo()),
        (PlainCfpo(), Cfpo()),
        (PlainCispo(0.8, 1.2), Cispo(0.8, 1.2)),
        (PlainQuadratic(), Quadratic()),
        (PlainPrimeRl(), PrimeRl(0.02, 0.03, 0.05, kl_tau=0.3)),
        (PlainBranches(), DhpoBranch(0.3, 0.2, 0.28, 0.1, 0.15)),
        (PlainK3(), KlK3(ceiling=0.05)),
        (PlainK3Unbiased(), PlainK3Unbiased()),  # its sum rounds what the built-in gate does not
    )
}

FUNCTIONS = {
    "log1p": lambda s, t: torch.log1p(s * s) + torch.log1p(s.abs() * 1e-5),
    "log": lambda s, t: torch.log(1e-3 + s * s),
    "expm1": lambda s, t: torch.expm1(s) - torch.expm1(-2 * s),
    "sigmoid": lambda s, t: torch.sigmoid(3 * s),
    "softplus": lambda s, t: torch.nn.functional.softplus(s, beta=2.0),
    "tanh": lambda s, t: torch.tanh(s),
    "sqrt": lambda s, t: (1 + s * s).sqrt() + (1 + s * s).rsqrt(),
    "powers": lambda s, t: s**3 - (2 + s * s) ** -1.5 + 2 / (1 + s**2),
    "relu": lambda s, t: torch.relu(s) + torch.nn.functional.relu(0.3 - s),
    "signs": lambda s, t: s.sign() * s.abs() + torch.sgn(s + 0.1) * s,
    "extremes": lambda s, t: torch.minimum(s, 0.3 - s) + torch.maximum(0.1 * s, -s),
    "truths": lambda s, t: torch.where(((s > -0.2) ^ (s >= 0.4)) == (s <= 1), s, s / 2) * ((s < 1) | (s != s)),
    "masked": lambda s, t: s.masked_fill(s.detach() > 0.5, 0.25) + torch.ones_like(s).sub(s, alpha=2),
    "position": lambda s, t: s * t.sqrt() + s / t**0.3,
}  # fmt: skip


def gate_of(function: str) -> tokenrl.Gate:
    """l = -A times a function."""
    value = FUNCTIONS[function]
    body = {
        "name": f"of_{function}",
        "value": lambda self, s, x, logp, advantages, t: -advantages * value(s, t),
    }
    return tokenrl.parametrised(type("OfFunction", (tokenrl.Gate,), body))()


def every_gate() -> dict[str, tokenrl.Gate]:
    return {name: gate for name, (gate, _) in PLAIN.items()} | {name: gate_of(name) for name in FUNCTIONS}


@cache
def sources() -> dict[str, str]:
    """The C++ of every gate."""
    return {name: cpp_source(traced(gate)) for name, gate in every_gate().items()}


def functors(of: dict[str, str]) -> ctypes.CDLL:
    """Gates without the objective around them, in one library."""
    text = '#include "gates/table.h"\n#include "fused/functions.h"\n#include "fused/values.h"\n'
    for name, source in of.items():
        text += f"#define Gate Gate_{name}\n{source}#undef Gate\n".replace("#pragma once", "")
        for kind in ("float", "double"):
            text += (
                f'extern "C" void {name}_{kind}(const {kind}* const* given, const double* params, int64_t n, '
                f"{kind}* const* out) {{\n  tokenrl::fused::gate_values<tokenrl::fused::Gate_{name}>(given, params, n, "
                "out);\n}\n"
            )
    source = host_build.BUILD / f"fused_gates-{host_build.digest(text)}.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    flags = ["-O1", "-fPIC", f"-I{ROOT / 'csrc'}"]
    return ctypes.CDLL(str(host_build.link("fused_gates.so", host_build.compile_all([source], flags), ["-shared"])))


def cpp_values(name: str, of: dict[str, str] | None = None):
    """As tokenrl.fusion.building.Library.values. of: the sources, else those of every gate."""
    library = functors(sources() if of is None else of)

    def values(s, x, logp, advantages, t, params):
        given, out = [s, x, logp, advantages, t], torch.empty(6, s.numel(), dtype=s.dtype)
        run = getattr(library, f"{name}_{'double' if s.dtype == torch.float64 else 'float'}")
        pointers = [(ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows)) for rows in (given, list(out))]
        run(pointers[0], (ctypes.c_double * 8)(*params), ctypes.c_int64(s.numel()), pointers[1])
        return out

    return values


def refused(*args, **kwargs):
    """In place of subprocess.run."""
    raise subprocess.SubprocessError("a compiler was called")
