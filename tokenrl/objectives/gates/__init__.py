"""THE table of gates."""

from .adaptive import Dhpo, DhpoBranch, Hapo
from .base import Gate
from .bounded import Cfpo, Identity, LogBand, PpoClip, PpoNtp, PrimeRl, Ratio, Sapo, SppoToken
from .kl import KlAbs, KlAbsUnbiased, KlK1, KlK1Unbiased, KlK2, KlK3, KlK3Unbiased
from .weighted import Cispo, Dppo, DppoKl, DppoTv, Quadratic, Rec, Reinforce, Topr, Vespo

GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (
        Ratio, PpoClip, PpoNtp, LogBand, Sapo, Cfpo, SppoToken, PrimeRl, Dhpo, DhpoBranch, Hapo, Cispo, Reinforce,
        Rec, Quadratic, Topr, Vespo, Dppo, DppoTv, DppoKl, KlK1, KlAbs, KlK2, KlK3, KlK1Unbiased, KlAbsUnbiased,
        KlK3Unbiased, Identity,
    )
}  # fmt: skip
MAX_PARAMS = max(len(gate().params()) for gate in GATES.values())  # a kernel has room for as many
