"""The ops on the process groups that a trainer already has. A group handed to an op is complete in its results: they
are those of all that its ranks hold, the same bits on each; the gradient is the own part. Nothing here creates a group,
and where none is given nothing of torch.distributed runs."""

from .batch_statistics import Moments, advantages_over, global_count, group_statistics, moments
from .context_shard import ContextShard
from .covariance import covariance_selection
from .global_weights import AVERAGED_OVER, averaged_over, global_weights
from .vocab_shard import VocabShard

__all__ = [
    "AVERAGED_OVER",
    "ContextShard",
    "Moments",
    "VocabShard",
    "advantages_over",
    "averaged_over",
    "covariance_selection",
    "global_count",
    "global_weights",
    "group_statistics",
    "moments",
]
