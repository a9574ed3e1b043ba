"""THE table of preference objectives: name = a link of the scores of sequences, and what their scores are."""

from dataclasses import dataclass

from ..batch.checks import check_name, check_number
from ..errors import described, wrong
from .changes import changed
from .links import (
    AlphaPo,
    ApoDown,
    ApoZero,
    ApoZeroUnpaired,
    Bco,
    BcoUnpaired,
    Discopop,
    Exo,
    Hinge,
    Kto,
    Link,
    MarginLink,
    Nca,
    OddsRatio,
    OfLabels,
    Robust,
    Sigmoid,
    Sppo,
    Squared,
)
from .scores import AlphaScore, ForwardKlScore, JsScore, Score

STATISTICS = {
    "sum": "x = sum_t w_t (logp_t - ref_logp_t)",
    "mean": "the same divided by the sequence's number of tokens",
}
COUPLINGS = {
    "pairs": "the link meets the scores x_w, x_l of each pair",
    "sorted_margins": "it meets S_w - S_l of the policy and of the reference, each sorted over the batch",
    "sorted_scores": "it meets the chosen scores and the rejected ones, each sorted over the batch",
    "labels": "it meets each sequence and its label",
}
DIVERGENCE_FLOWS = {
    "both": "a gradient to the divergences of both sequences",
    "rejected": "none to those of the chosen one",
}


@dataclass(frozen=True, eq=False)
class Preference:
    """One preference objective: the mean over pairs of link(x_w, x_l), and nll times the mean of -logp.

    link, score: see tokenrl/objectives/links.py and scores.py; a score is of the sum, before a mean divides. statistic,
    coupling, divergence_flow: names of the tables above. reference: "given", log ratios to it, or "none", log-probs
    alone. divergence: the factor of sum_t v_t D_t that is added to a score, D_t a divergence per token, 0 for none.
    length: the factor of its number of tokens that is added to beta times a score, so that what is long wins less.
    nll: the factor of the mean of -logp over the tokens of nll_mask. source, certainty: as for tokenrl.Objective.
    """

    name: str
    link: Link
    statistic: str
    reference: str
    source: str
    score: Score = Score()
    coupling: str = "pairs"
    divergence: float = 0.0
    divergence_flow: str = "both"
    length: float = 0.0
    nll: float = 0.0
    certainty: str = "T"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("statistic", STATISTICS), ("coupling", COUPLINGS), ("divergence_flow", DIVERGENCE_FLOWS),
            ("reference", ("given", "none")),
        ):  # fmt: skip
            check_name(name, getattr(self, name), accepted)
        for name in ("divergence", "length", "nll"):
            check_number(name, getattr(self, name), 0)
        for name, kind in (("link", Link), ("score", Score)):
            if not isinstance(getattr(self, name), kind):
                raise wrong(name, described(getattr(self, name)), f"a {name} of tokenrl/objectives/{name}s.py")
        if isinstance(self.link, OfLabels) != (self.coupling == "labels"):
            raise wrong("coupling", repr(self.coupling), "'labels' with the links of one sequence, and with no other")
        plain = isinstance(self.link, MarginLink) and self.coupling == "pairs"
        if type(self.score) is not Score and not (plain and self.reference == "given"):
            raise wrong("score", type(self.score).__name__, "one only where a link meets the difference of log ratios")

    @property
    def parts(self) -> dict[str, Link | Score]:
        """What holds the parameters."""
        return {"link": self.link, "score": self.score}


_SUM, _MEAN = ("sum", "given"), ("mean", "given")
_ALONE, _MEAN_ALONE = ("sum", "none"), ("mean", "none")
_F = "f-DPO, arXiv 2309.16240 (TRL)"

_ROWS = (
    Preference("dpo", Sigmoid(), *_SUM, "arXiv 2305.18290; label smoothing: conservative DPO"),
    Preference("r_dpo", Sigmoid(), *_SUM, "arXiv 2403.19159; the sign by its derivation, of rewards less alpha |y|",
               length=0.01, certainty="NR"),
    Preference("dpo_norm", Sigmoid(), *_MEAN, "Tulu 3, arXiv 2411.15124 (TRL sigmoid_norm)"),
    Preference("dpo_hinge", Hinge(), *_SUM, "RSO, arXiv 2309.06657 (TRL hinge)"),
    Preference("dpo_robust", Robust(), *_SUM, "arXiv 2403.00409 (TRL)"),
    Preference("dpo_forward_kl", Sigmoid(), *_SUM, _F, score=ForwardKlScore()),
    Preference("dpo_js", Sigmoid(), *_SUM, _F, score=JsScore()),
    Preference("dpo_alpha", Sigmoid(), *_SUM, _F, score=AlphaScore()),
    Preference("ipo", Squared(), *_MEAN, "arXiv 2310.12036; the mean as in TRL, by its authors' word"),
    Preference("ipo_sum", Squared(), *_SUM, "arXiv 2310.12036, eq. 17 (MAH-DPO's code)", certainty="PC"),
    Preference("exo", Exo(), *_SUM, "arXiv 2402.00856, eq. 16 (TRL exo_pair)"),
    Preference("nca", Nca(), *_SUM, "arXiv 2402.05369 (TRL nca_pair)"),
    Preference("bco", Bco(), *_SUM, "arXiv 2404.04656, of pairs and without its shift (TRL bco_pair)"),
    Preference("sppo", Sppo(), *_SUM, "arXiv 2405.00675, hard labels (TRL sppo_hard)"),
    Preference("aot", Sigmoid(), *_SUM, "arXiv 2406.05882 (TRL)", coupling="sorted_margins"),
    Preference("aot_unpaired", Sigmoid(), *_SUM, "arXiv 2406.05882 (TRL)", coupling="sorted_scores"),
    Preference("apo_zero", ApoZero(), *_SUM, "arXiv 2408.06266, eq. 7 (TRL)"),
    Preference("apo_down", ApoDown(), *_SUM, "arXiv 2408.06266, eq. 8 (TRL)"),
    Preference("discopop", Discopop(), *_SUM, "arXiv 2406.08414, eq. 5 (TRL)"),
    Preference("simpo", Sigmoid(beta=2.0, gamma=0.5), *_MEAN_ALONE, "arXiv 2405.14734 (TRL, without its NLL)"),
    Preference("alphapo", AlphaPo(beta=2.5, gamma=0.3), *_MEAN_ALONE, "arXiv 2501.03884 (TRL)"),
    Preference("cpo", Sigmoid(), *_ALONE, "arXiv 2401.08417 (TRL)", nll=1.0),
    Preference("slic", Hinge(), *_ALONE, "arXiv 2305.10425 (TRL's CPO with hinge)", nll=1.0),
    Preference("orpo", OddsRatio(), *_MEAN_ALONE, "arXiv 2403.07691 (TRL)", nll=1.0),
    Preference("tpo", Sigmoid(beta=0.01), *_ALONE, "arXiv 2405.16681 (TRL)", nll=1.0),
    Preference("tpo_l", Sigmoid(beta=0.01, gamma=0.5), *_MEAN_ALONE, "arXiv 2405.16681 (TRL)", nll=1.0),
    Preference("kto", Kto(), *_SUM, "arXiv 2402.01306, eq. 7 (TRL)", coupling="labels"),
    Preference("bco_unpaired", BcoUnpaired(), *_SUM, "arXiv 2404.04656 (TRL up to 0.29)",
               coupling="labels"),
    Preference("apo_zero_unpaired", ApoZeroUnpaired(), *_SUM, "arXiv 2408.06266 (TRL)", coupling="labels"),
    Preference("tdpo1", Sigmoid(), *_SUM, "arXiv 2404.11999", divergence=1.0, certainty="C"),
    Preference("tdpo2", Sigmoid(), *_SUM, "arXiv 2404.11999", divergence=0.5, divergence_flow="rejected",
               certainty="C"),
    Preference("sparsepo", Sigmoid(), *_SUM, "arXiv 2410.05102", divergence=1.0, certainty="C"),
)  # fmt: skip
PREFERENCES: dict[str, Preference] = {row.name: row for row in _ROWS}
_CHANGEABLE = ("link", "score", "statistic", "reference", "coupling", "divergence", "divergence_flow", "length",
               "nll")  # fmt: skip


def preference(name: str | Preference, **parameters: object) -> Preference:
    """A row of the table, with any of its parameters changed.

        tokenrl.preference("dpo", beta=0.2, label_smoothing=0.1)

    Args:
        name: of tokenrl.PREFERENCES, or a row.
        parameters: those of its link and score (beta, label_smoothing, gamma, tau, alpha, desirable_weight, ...) and of
            the row itself (link, score, statistic, reference, coupling, divergence, divergence_flow, length, nll).

    Raises:
        ValueError: for an unknown name, naming the nearest, and for a value that a part does not accept.
    """
    if isinstance(name, Preference):
        row = name
    else:
        if not isinstance(name, str):
            raise wrong("objective", described(name), "a name of tokenrl.PREFERENCES, or what preference returns")
        check_name("objective", name, PREFERENCES)
        row = PREFERENCES[name]
    return changed(row, parameters, _CHANGEABLE)
