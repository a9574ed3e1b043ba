"""Drop-ins: what TRL 1.16 (trl.trainer.utils) and verl (verl.utils.torch_functional) call, computed by token_logprobs.

The names, the arguments and the numbers are theirs. What differs, always:
- results are fp32 for 16-bit logits (TRL's torch code returns the dtype of the logits), fp64 for fp64 ones;
- -inf logits have no part in the entropy, which TRL's torch code makes nan;
- an id of -100 gives 0 and no gradient, and a row without any other id is never read.
Logits with 2 or 3 dimensions are read in place, strided views too; with more they are reshaped, which may copy.
"""

from .trl import entropy_from_logits, selective_log_softmax, selective_log_softmax_and_entropy
from .verl import logprobs_from_logits

__all__ = [
    "entropy_from_logits",
    "logprobs_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
