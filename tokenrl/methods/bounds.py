"""Bounds of the ratio and entropy scores per token, of BandPO, SSPO and HAPO: the face of the three."""

from .bandpo import bandpo
from .hapo import HapoStatistics, hapo_score
from .hapo import entropy_statistics as hapo_statistics
from .sspo import entropy_bounds, entropy_range, segment_ids

__all__ = [
    "HapoStatistics", "bandpo", "entropy_bounds", "entropy_range", "hapo_score", "hapo_statistics", "segment_ids",
]  # fmt: skip
