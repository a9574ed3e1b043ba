"""The ops on the process groups that a trainer already has. A group handed to an op is complete in its results: they
are those of all that its ranks hold, the same bits on each; the gradient is the own part. Nothing here creates a group,
and where none is given nothing of torch.distributed runs."""

from .context_shard import ContextShard
from .vocab_shard import VocabShard

__all__ = ["ContextShard", "VocabShard"]
