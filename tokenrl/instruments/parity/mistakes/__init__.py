"""THE table of mistakes that losses are known for, each a computation of its own that a wrong loss is compared with."""

from .base import Mistake
from .clips import clips
from .heads import halves, heads
from .inputs import advantages, masks
from .means import means
from .penalties import penalties
from .ratios import exchanged, flows, positions, prefixes

MISTAKES: tuple[Mistake, ...] = (
    *prefixes(), *positions(), *exchanged(), *flows(), *clips(), *means(), *masks(), *penalties(), *advantages(),
    *heads(), *halves(),
)  # fmt: skip

__all__ = ["MISTAKES", "Mistake"]
