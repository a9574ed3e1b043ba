"""THE table of policy objectives: name = statistic x flow x gate x default aggregation, with its paper."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..batch.checks import check_name, check_number
from ..errors import described, unknown, wrong
from .aggregations import AGGREGATIONS
from .changes import changed
from .forms.base import Form
from .forms.fibration import ApcObj, FiberPo, FiberPoDomain
from .forms.ratios import Gmpo, Hmpo, Real
from .forms.weights import ClipCov, FutureKl, KlCov, PrefixBudget
from .gates import GATES
from .gates.adaptive import Dhpo, DhpoBranch, Hapo
from .gates.base import INF, Gate, check_params
from .gates.bounded import Cfpo, LogBand, PpoClip, PpoNtp, PrimeRl, Ratio, Sapo, SppoToken
from .gates.kl import KlAbs, KlAbsUnbiased, KlGate, KlK1, KlK1Unbiased, KlK2, KlK3, KlK3Unbiased
from .gates.weighted import Cispo, Dppo, DppoKl, DppoTv, Quadratic, Rec, Reinforce, Topr, Vespo
from .statistics import check_statistic

CERTAINTY = {  # where a row was read; docstrings say it in these words, after "Source:"
    "C": "authors' code",
    "P": "paper",
    "N": "notes, independent ones with the full text",
    "T": "trainers of third parties",
    "R": "our reading, where the sources are silent",
    "V": "verified numerically",
}


@dataclass(frozen=True, eq=False)
class Objective:
    """One policy objective.

    statistic, flow: see tokenrl/objectives/statistics.py. gate: see tokenrl/objectives/gates/. form: what happens
    around the row, see tokenrl/objectives/forms/base.py; None: nothing. aggregation: the method's own, used when a call
    names none. clamp: each token's log ratio is clamped to +-clamp (zero gradient outside; inf: off). cap: upper bound
    of the statistic (zero gradient above; inf: off). source: the paper, and in whose code it was read. certainty: how
    it is known, letters of CERTAINTY; where R is among them, source says what is our reading.
    """

    name: str
    statistic: str
    gate: Gate
    aggregation: str
    source: str
    flow: str = "through"
    clamp: float = 20.0
    cap: float = INF
    form: Form | None = None
    certainty: str = ""

    def __post_init__(self) -> None:
        check_statistic(self.statistic, self.flow)
        check_name("aggregation", self.aggregation, AGGREGATIONS)
        check_number("clamp", self.clamp, above=0, accepted="a positive number, inf to turn it off")
        check_number("cap", self.cap, accepted="a number, inf to turn it off")
        for name in ("clamp", "cap"):  # the ops take Python's floats alone
            if type(getattr(self, name)) is not float:
                object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.gate, Gate):
            raise wrong("gate", described(self.gate), "a gate, as those of tokenrl/objectives/gates")
        if self.form is not None and not isinstance(self.form, Form):
            raise wrong("form", described(self.form), "a form, as those of tokenrl/objectives/forms, or None")
        if GATES.get(self.gate.name, type(self.gate)) is not type(self.gate):  # its kernels would run another formula
            given = f"{type(self.gate).__name__} of the name {self.gate.name!r}"
            raise wrong("gate", given, f"a name of its own, that one is {GATES[self.gate.name].__name__}'s")
        if self.form is not None and self.form.replaces_ratio and len(self.gate.slopes) > 1:
            given = f"{type(self.gate).__name__}, whose loss has a slope in the ratio and in logp"
            raise wrong("gate", given, f"a gate with one of the two; {type(self.form).__name__} replaces the ratio")
        for part in self.parts.values():
            check_params(part)

    @property
    def parts(self) -> dict[str, Gate | Form]:
        """What holds the parameters: the gate and, where there is one, the form."""
        return {"gate": self.gate} | ({} if self.form is None else {"form": self.form})


_BAND = LogBand()
_FIFTH_TO_FIVE = Cispo(eps_low=0.8, eps_high=4.0, bound="relative")
_KL = "Schulman, Approximating KL divergence; old_logp is the reference's log-prob"

_ROWS = (
    Objective("ppo", "token", PpoClip(), "token-mean", "arXiv 1707.06347", certainty="T"),
    Objective("grpo", "token", PpoClip(), "seq-mean-token-mean", "arXiv 2402.03300", certainty="T"),
    Objective("dr_grpo", "token", PpoClip(), "seq-mean-token-sum-norm", "arXiv 2503.20783", certainty="T"),
    Objective("dapo", "token", PpoClip(eps_high=0.28), "token-mean", "arXiv 2503.14476", certainty="T"),
    Objective("bnpo", "token", PpoClip(), "token-mean", "TRL: the count of the local batch", certainty="T"),
    Objective("ba", "token", PpoClip(), "balanced", "arXiv 2605.04077; a row of A = 0 counting in G is our reading",
              certainty="NR"),
    Objective("gspo", "span_mean", PpoClip(3e-4, 4e-4), "seq-mean-token-mean",
              "arXiv 2507.18071, eq. 5", clamp=INF, certainty="T"),
    Objective("gspo_token", "span_mean", PpoClip(3e-4, 4e-4), "seq-mean-token-mean",
              "arXiv 2507.18071, eq. 13", flow="local", clamp=INF, cap=10.0, certainty="T"),
    Objective("sspo", "span_mean", PpoClip(6e-3, 8e-3), "seq-mean-token-mean",
              "arXiv 2511.04256; the formula and the bounds are our reading", flow="local",
              clamp=INF, cap=10.0, certainty="R"),
    Objective("lpo", "span_mean", PpoClip(0.03, 0.03), "token-mean",
              "Ling 2.0, arXiv 2510.22115, sec. 4.2; its sentences are segment_ids", clamp=INF, certainty="P"),
    Objective("dhpo", "span_mean", Dhpo(), "seq-mean-token-mean",
              "arXiv 2601.05607; joint minimum and bounds are our reading", flow="local", certainty="NR"),
    Objective("dhpo_branch", "span_mean", DhpoBranch(), "seq-mean-token-mean",
              "arXiv 2601.05607; a minimum per branch and bounds are our reading", flow="local", certainty="NR"),
    Objective("gmpo", "span_mean", Ratio(), "seq-mean-token-mean", "arXiv 2507.20673; verl geo_mean, TRL",
              clamp=INF, form=Gmpo(), certainty="CT"),
    Objective("hmpo", "token", Ratio(), "seq-mean-token-mean", "GMPO's authors' code", clamp=60.0, form=Hmpo(),
              certainty="C"),
    Objective("fiberpo", "token", Ratio(), "seq-mean-token-mean",
              "arXiv 2603.08239, 2604.03044; bounds of its fig. 4", form=FiberPo(), certainty="PV"),
    Objective("fiberpo_domain", "token", Ratio(), "seq-mean-token-mean", "arXiv 2603.08239, def. 6.4",
              form=FiberPoDomain(), certainty="P"),
    Objective("apc_obj", "token", Ratio(), "token-mean",
              "arXiv 2603.08239, eq. 3; delta and the slope of B are our reading", form=ApcObj(), certainty="PR"),
    Objective("real", "span_mean", Ratio(), "group-mean", "arXiv 2602.05630 (ms-swift)", clamp=INF, form=Real(),
              certainty="T"),
    Objective("luspo", "span_mean", PpoClip(2e-3, 2.5e-3), "seq-mean-token-sum",
              "arXiv 2602.05261 (TRL)", clamp=INF, certainty="T"),
    Objective("cispo", "token", Cispo(), "token-mean", "arXiv 2506.13585", certainty="T"),
    Objective("sapo", "token", Sapo(), "seq-mean-token-mean", "arXiv 2511.20347", certainty="TV"),
    Objective("cfpo", "token", Cfpo(), "token-mean", "arXiv 2601.22801, eq. 7, SPO's of arXiv 2401.16025",
              certainty="NT"),
    Objective("sppo_token", "token", SppoToken(), "token-mean", "arXiv 2108.05828 (Trinity-RFT)", certainty="T"),
    Objective("prime_rl", "token", PrimeRl(), "token-mean", "prime-rl, its default loss", clamp=INF, certainty="T"),
    Objective("prime_rl_ipo", "token", PrimeRl(0.1, 0.1, 0.1), "token-mean", "prime-rl, ipo", clamp=INF,
              certainty="T"),
    Objective("ratio", "token", Ratio(), "token-mean", "the importance-weighted policy gradient, unclipped",
              certainty="T"),
    Objective("reinforce", "token", Reinforce(), "token-mean", "Williams 1992; verl", certainty="T"),
    Objective("gpg", "token", Reinforce(), "token-mean", "arXiv 2504.02546 (verl)", certainty="T"),
    Objective("opmd", "token", Reinforce(1.0), "token-mean", "OPMD (Trinity-RFT)", certainty="T"),
    Objective("rec", "token", Rec(), "token-mean", "arXiv 2509.24203, REC-OneSide (Trinity-RFT)", certainty="T"),
    Objective("rec_ring", "token", Rec(keep="ring"), "token-mean", "arXiv 2509.24203, REC-Ring (Trinity-RFT)",
              certainty="T"),
    Objective("dro", "token", Quadratic(0.05), "token-mean",
              "arXiv 2405.19107 (verl); beta as in verl's tests and Tinker's documentation", clamp=INF, certainty="T"),
    Objective("kimi15", "token", Quadratic(0.1), "token-mean", "arXiv 2501.12599 (ROLL)", clamp=INF, certainty="T"),
    Objective("topr", "span_sum", Topr(), "seq-mean-token-sum", "arXiv 2503.14286, eq. 8", certainty="PT"),
    Objective("topr_roll", "token", Topr(), "seq-mean-token-mean", "arXiv 2503.14286 (ROLL)", certainty="T"),
    Objective("topr_trinity", "token", Topr(), "token-mean", "arXiv 2503.14286 (Trinity-RFT)", certainty="T"),
    Objective("vespo", "span_sum", Vespo(), "token-mean", "VESPO, authors' code", cap=20.0, certainty="CTV"),
    Objective("dppo_tv", "token", DppoTv(), "seq-mean-token-sum-norm", "arXiv 2602.04879, binary TV", clamp=INF,
              certainty="CT"),
    Objective("dppo_kl", "token", DppoKl(), "seq-mean-token-sum-norm", "arXiv 2602.04879, binary KL", clamp=INF,
              certainty="CT"),
    Objective("dppo_topk", "token", Dppo(), "seq-mean-token-sum-norm",
              "arXiv 2602.04879, divergence by tokenrl.topk_divergence", clamp=INF, certainty="C"),
    Objective("ctpo", "prefix_sum", _BAND, "seq-mean-token-mean", "arXiv 2605.07331", flow="local", cap=10.0,
              certainty="CV"),
    Objective("ctpo_geomean", "prefix_mean", dataclasses.replace(_BAND, power=-0.5), "seq-mean-token-mean",
              "arXiv 2605.07331", flow="local", cap=10.0, certainty="CV"),
    Objective("ctpo_fixed", "prefix_sum", PpoClip(dual=3.0), "seq-mean-token-mean",
              "arXiv 2605.07331, cum-token-cumprod", flow="local", cap=10.0, certainty="C"),
    Objective("ctpo_geomean_fixed", "prefix_mean", PpoClip(dual=3.0), "seq-mean-token-mean",
              "arXiv 2605.07331, cum-token-geomean", flow="local", cap=10.0, certainty="C"),
    Objective("minpro", "prefix_min", _FIFTH_TO_FIVE, "token-mean",
              "arXiv 2601.22718; bounds are our reading", flow="local", certainty="NR"),
    Objective("minpro_capped", "prefix_min_capped", _FIFTH_TO_FIVE, "token-mean",
              "our reading of arXiv 2601.22718: m_t at most 1", flow="local", certainty="R"),
    Objective("minpro_clip", "prefix_min", PpoClip(), "token-mean",
              "our reading of arXiv 2601.22718: PPO's clip of m_t r_t", flow="local", certainty="R"),
    Objective("hapo", "token", Hapo(), "token-mean", "arXiv 2509.16591", clamp=INF, certainty="C"),
    Objective("rmt", "token", PpoNtp(), "token-mean",
              "arXiv 2509.24375; the mean over its next tokens is our reading", certainty="NR"),
    Objective("cppo", "token", Ratio(), "token-mean", "arXiv 2606.10968; UniRL", form=PrefixBudget(), certainty="PT"),
    Objective("fipo", "token", PpoClip(eps_high=0.28), "token-mean", "arXiv 2603.19835 (ms-swift)", clamp=INF,
              form=FutureKl(), certainty="T"),
    Objective("clip_cov", "token", PpoClip(), "token-mean", "arXiv 2505.22617 (verl)", clamp=INF, form=ClipCov(),
              certainty="T"),
    Objective("kl_cov", "token", Ratio(), "token-mean", "arXiv 2505.22617 (verl)", clamp=INF, form=KlCov(),
              certainty="T"),
    Objective("kl_abs", "token", KlAbs(), "token-mean", _KL + " (verl abs)", certainty="T"),
    Objective("kl_k1", "token", KlK1(), "token-mean", _KL, certainty="T"),
    Objective("kl_k2", "token", KlK2(), "token-mean", _KL, certainty="T"),
    Objective("kl_k3", "token", KlK3(), "token-mean", _KL, certainty="T"),
    Objective("kl_k1_unbiased", "token", KlK1Unbiased(), "token-mean", _KL + " (verl k1+)", certainty="T"),
    Objective("kl_abs_unbiased", "token", KlAbsUnbiased(), "token-mean", _KL + " (verl abs+)", certainty="T"),
    Objective("kl_k3_unbiased", "token", KlK3Unbiased(), "token-mean", _KL + " (verl k3+)", certainty="T"),
)  # fmt: skip

OBJECTIVES: dict[str, Objective] = {row.name: row for row in _ROWS}


def find_objective(name: str | Objective) -> Objective:
    """The row of that name, or the row itself."""
    if isinstance(name, Objective):
        return name
    if not isinstance(name, str):
        raise wrong("objective", described(name), "a name of tokenrl.OBJECTIVES, or what tokenrl.objective returns")
    check_name("objective", name, OBJECTIVES)
    return OBJECTIVES[name]


_CHANGEABLE = ("statistic", "flow", "gate", "form", "aggregation", "clamp", "cap")


def objective(name: str | Objective, **parameters: Any) -> Objective:
    """A row of the table, with any of its parameters changed.

        tokenrl.objective("ctpo", eps_low=0.03, power=0.5)

    Args:
        name: of tokenrl.OBJECTIVES, or a row.
        parameters: those of the row's gate and of its form in the method's own terms (eps_low, eps_high, dual,
            eps_dual, power, bound, tau_pos, tau_neg, ceiling, ...: numbers, or tensors with one value per token) and of
            the Objective itself (statistic, flow, gate, form, aggregation, clamp, cap).

    Returns:
        The row; the table is as it was.

    Raises:
        ValueError: for an unknown name, naming the nearest, and for a value that a part does not accept.
    """
    row = find_objective(name)
    return changed(row, parameters, _CHANGEABLE)


def kl_estimator(name: str | Objective) -> Objective:
    """A row that estimates a KL divergence token by token: kl_*, with any of its numbers changed."""
    row = name if isinstance(name, Objective) else OBJECTIVES.get(name) if isinstance(name, str) else None
    if row is None or not isinstance(row.gate, KlGate) or row.statistic != "token":
        known = [known.name for known in OBJECTIVES.values() if isinstance(known.gate, KlGate)]
        raise unknown("kl", name if row is None else row.name, known)
    if any(isinstance(p, Tensor) for p in row.gate.params()):
        raise wrong("kl", "a gate with a tensor for a parameter", "numbers")
    return row


def register(row: Objective) -> Objective:
    """Adds a row to the table of objectives: its name is then accepted wherever an objective's is. Returns the row.

    Its gate may be of a class of your own: a subclass of tokenrl.Gate, decorated with tokenrl.parametrised, with a name
    and a value in torch. It runs at once on the reference backend, with autograd's derivative, and calls that name no
    backend get that one. Given its Triton function (register_triton) it runs on Triton too. The C++ backends run the
    gates of csrc/gates/table.h alone, and say so.

    Args:
        row: its name is not in the table yet.

    Raises:
        ValueError: where it is.
    """
    if row.name in OBJECTIVES:
        raise wrong("name", repr(row.name), "a name that is not in the table yet")
    GATES.setdefault(row.gate.name, type(row.gate))
    OBJECTIVES[row.name] = row
    return row
