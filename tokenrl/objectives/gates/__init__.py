"""THE table of gates."""

from .adaptive import Dhpo, DhpoBranch, Hapo
from .base import Gate
from .bounded import Identity, LogBand, PpoClip, PpoNtp, Ratio, Sapo
from .kl import KlAbs, KlAbsUnbiased, KlK1, KlK1Unbiased, KlK2, KlK3, KlK3Unbiased
from .weighted import Cispo, Dppo, DppoKl, DppoTv, Quadratic, Reinforce, Topr, Vespo

GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (
        Ratio, PpoClip, PpoNtp, LogBand, Sapo, Dhpo, DhpoBranch, Hapo, Cispo, Reinforce, Quadratic, Topr, Vespo, Dppo,
        DppoTv, DppoKl, KlK1, KlAbs, KlK2, KlK3, KlK1Unbiased, KlAbsUnbiased, KlK3Unbiased, Identity,
    )
}  # fmt: skip
