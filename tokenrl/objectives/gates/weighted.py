"""Gates that weigh the policy gradient, l = -sg[w] A logp; Quadratic adds a pull towards the old policy."""

import math

import torch
from torch import Tensor

from ...batch.checks import check_name
from .base import INF, POSITIVE, WIDTH, Bound, Bounds, Gate, as_tensor_like, clamp, parametrised, product, used


def weighted(weight: Bound, advantages: Tensor, logp: Tensor) -> Tensor:
    """-sg[w] A logp, 0 where w or A is 0."""
    weight = as_tensor_like(weight, logp).detach()
    return product(product(-advantages, weight), logp)


@parametrised
class Cispo(Gate):
    """l = -sg[clip(r, low, high)] A logp: no token is dropped, its weight is bounded.

    bound="raw": low = eps_low, high = eps_high are the bounds themselves (TRL, Liger, ms-swift); bound="relative":
    low = 1 - eps_low, high = 1 + eps_high (verl, slime, NeMo-RL). eps_low=None: no lower bound. clip_high counts tokens
    of either sign of A, as verl does; TRL counts A > 0 only.

    Source: CISPO, MiniMax-M1, arXiv 2506.13585 (trainers).
    """

    name = "cispo"
    slopes = ("logp",)
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH}
    eps_low: Bound | None = None
    eps_high: Bound = 5.0
    bound: str = "raw"

    def __post_init__(self) -> None:
        check_name("bound", self.bound, ("raw", "relative"))

    def params(self) -> tuple[Bound, Bound]:
        low = 0.0 if self.eps_low is None else self.eps_low
        if self.bound == "raw":
            return low, self.eps_high
        return 0.0 if self.eps_low is None else 1 - low, 1 + self.eps_high

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return weighted(clamp(s.exp(), *self.params()), advantages, logp)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        ratio, (low, high) = s.exp(), self.params()
        return ratio < low, ratio > high, torch.zeros_like(ratio, dtype=torch.bool)


@parametrised
class Reinforce(Gate):
    """l = -A logp / (1 + tau): no ratio. REINFORCE; GPG is the same loss with its own advantages. tau: of OPMD,
    0 for the others.

    Source: GPG, arXiv 2504.02546; OPMD, Trinity-RFT (trainers).
    """

    name = "reinforce"
    slopes = ("logp",)
    ranges = {"tau": WIDTH}
    tau: Bound = 0.0

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return weighted(1 / (1 + self.tau), advantages, logp)


@parametrised
class Rec(Gate):
    """l = -sg[w] A logp of the tokens that are kept, else 0: clipping as a choice of tokens.   r = exp(s)

    keep: "none", all; "one-side", PPO's, r <= 1 + eps_high where A > 0 and r >= 1 - eps_low where A < 0; "two-side",
    both bounds for either sign; "ring", both, and what lies beyond r <= 1 - eps_low_prime where A > 0, r >= 1 +
    eps_high_prime where A < 0. weight: "none", 1; "ratio", r; "clipped-ratio", r in [1 - eps_low_prime, 1 +
    eps_high_prime]. clip_low, clip_high: dropped below and above, none of A = 0.

    With statistic="span_mean" both look at the geometric mean of a sequence's ratios (Trinity's gspo-one-side). Its
    regularisers are terms with ref_logp=old_logp: "k2" kl="kl_k2" with kl_coef = 2 coef, "forward-kl" kl="kl_k1" with
    kl_coef = -coef; its weight "advantage" is a factor e^(A / temp) of the advantages.

    Source: REC, arXiv 2509.24203, Trinity-RFT (trainers).
    """

    name = "rec"
    ranges = dict.fromkeys(("eps_low", "eps_high", "eps_low_prime", "eps_high_prime"), WIDTH)
    slopes = ("logp",)
    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    eps_low_prime: Bound = 0.6
    eps_high_prime: Bound = 2.0
    keep: str = "one-side"
    weight: str = "none"

    def __post_init__(self) -> None:
        check_name("keep", self.keep, ("none", "one-side", "two-side", "ring"))
        check_name("weight", self.weight, ("none", "ratio", "clipped-ratio"))

    def params(self) -> tuple[Bound, ...]:
        """weight_low, weight_high; low, high: what is kept of either sign; ring_low, ring_high: from where on so is
        what lies on the side to which the advantage does not push."""
        inside, prime = (1 - self.eps_low, 1 + self.eps_high), (1 - self.eps_low_prime, 1 + self.eps_high_prime)
        weight = {"none": (1.0, 1.0), "ratio": (0.0, INF), "clipped-ratio": prime}[self.weight]
        everything = (-INF, INF)
        ring = {"none": everything, "one-side": inside, "two-side": everything, "ring": prime}[self.keep]
        return *weight, *(everything if self.keep == "none" else inside), *ring

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        low, high, _ = self.clipped(s, x, logp, advantages, t)
        return weighted(torch.where(low | high, 0, clamp(s.exp(), *self.params()[:2])), advantages, logp)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low, high, ring_low, ring_high = (as_tensor_like(bound, s) for bound in self.params()[2:])
        ratio, positive, negative = s.exp(), advantages > 0, advantages < 0
        below = (ratio < low) & (negative | (positive & (ratio > ring_low)))
        above = (ratio > high) & (positive | (negative & (ratio < ring_high)))
        return below, above, torch.zeros_like(below)


@parametrised
class Quadratic(Gate):
    """l = -A logp + beta / 2 s^2: a policy gradient held near the old policy by its squared log ratio.

    Source: DRO, arXiv 2405.19107, verl; Kimi k1.5, arXiv 2501.12599, with tau for beta, ROLL (trainers).
    """

    name = "quadratic"
    vanishes = False
    slopes = ("s", "logp")
    beta: Bound = 1.0

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return weighted(1, advantages, logp) + self.beta / 2 * used(self.beta, s).square()


@parametrised
class Topr(Gate):
    """l = -sg[w] A logp, w = 1 where A > 0, else min(r, ceiling): only what was wrong is importance-weighted.

    The paper's ratio is the trajectory's, ROLL's and Trinity's the token's. score: what is compared with 0 in place of
    A; ROLL's is the reward. clip_low: A (the score) is at most 0 and r above the ceiling.

    Source: TOPR, arXiv 2503.14286 (trainers).
    """

    name = "topr"
    slopes = ("logp",)
    ranges = {"ceiling": POSITIVE}
    ceiling: Bound = 1.0
    score: Bound | None = None

    def params(self) -> tuple[Bound, Bound]:
        return self.ceiling, math.nan if self.score is None else self.score

    def _wrong(self, advantages: Tensor) -> Tensor:
        score = advantages if self.score is None else self.score
        return ~torch.as_tensor(score > 0, device=advantages.device)

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return weighted(torch.where(self._wrong(advantages), clamp(s.exp(), -INF, self.ceiling), 1), advantages, logp)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low = self._wrong(advantages) & (s.exp() > self.ceiling)
        return low, torch.zeros_like(low), torch.zeros_like(low)


@parametrised
class Vespo(Gate):
    """l = -sg[phi(r)] A logp, phi = e^(lambda + k log r - lambda r), r the sequence's product of ratios.

    Importance weights of the rollout (rollout_logp, correction) are factors of r, each at least 1e-8.
    k, lambda of A >= 0 are k_pos, lambda_pos. phi(1) = 1, phi peaks at k / lambda. log r is clamped to
    [floor, 20]; TRL's floor is log 1e-8.

    Source: VESPO (authors' code, trainers, verified).
    """

    name = "vespo"
    slopes = ("logp",)
    reads_rollout = True
    ranges = dict.fromkeys(("k_pos", "lambda_pos", "k_neg", "lambda_neg"), WIDTH)
    k_pos: Bound = 2.0
    lambda_pos: Bound = 3.0
    k_neg: Bound = 3.0
    lambda_neg: Bound = 2.0
    floor: Bound = -20.0

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        k_pos, lambda_pos, k_neg, lambda_neg, floor = (as_tensor_like(p, s) for p in self.params())
        k, decay = torch.where(advantages < 0, k_neg, k_pos), torch.where(advantages < 0, lambda_neg, lambda_pos)
        log_ratio = clamp(s, floor, 20)
        return weighted(torch.exp(decay + k * log_ratio - decay * log_ratio.exp()), advantages, logp)


@parametrised
class DppoGate(Gate):
    """Base of DPPO's masks: l = -sg[min(r, ceiling)] A logp where the token is kept, else 0.

    p = e^logp, mu = e^(logp - s), the old policy's (of a log ratio without clamp). Dropped: A > 0 and the divergence
    upwards is above eps_high, A <= 0 and downwards above eps_low. The gradient is through logp alone. The paper anchors
    on the rollout's log-probs: hand them in as old_logp. clip_high, clip_low: dropped by either bound; clip_dual: kept
    with a truncated ratio.

    Source: arXiv 2602.04879 (authors' code); verl (trainers).
    """

    slopes = ("logp",)
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH, "ceiling": POSITIVE}
    eps_low: Bound = 0.15
    eps_high: Bound = 0.15
    ceiling: Bound = 20.0

    def distance(self, p: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no gate: it defines no distance")

    def _dropped(self, s: Tensor, logp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        p, mu = logp.exp().clamp(max=1), (logp - s).exp().clamp(max=1)
        far, positive = self.distance(p, mu, s), advantages > 0
        return ~positive & (p < mu) & (far > self.eps_low), positive & (p > mu) & (far > self.eps_high)

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        low, high = self._dropped(s.detach(), logp.detach(), advantages)
        return weighted(torch.where(low | high, 0, clamp(s.exp(), -INF, self.ceiling)), advantages, logp)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low, high = self._dropped(s, logp, advantages)
        return low, high, ~(low | high) & (s.exp() > self.ceiling)


@parametrised
class Dppo(DppoGate):
    """DPPO with a divergence given per token, as tokenrl.topk_divergence computes it from the top-K. See DppoGate."""

    name = "dppo"
    divergence: Bound = 0.0

    def distance(self, p: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        return as_tensor_like(self.divergence, s)


@parametrised
class DppoTv(DppoGate):
    """DPPO with the total variation of taking the token or not, |p - mu|. See DppoGate."""

    name = "dppo_tv"

    def distance(self, p: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        return (p - mu).abs()


@parametrised
class DppoKl(DppoGate):
    """DPPO with the KL divergence of taking the token or not, mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)), 1e-8
    added to both of the latter. See DppoGate."""

    name = "dppo_kl"
    eps_low: Bound = 0.05
    eps_high: Bound = 0.05

    def distance(self, p: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        return -product(mu, s) + (1 - mu) * torch.log((1 - mu + 1e-8) / (1 - p + 1e-8))
