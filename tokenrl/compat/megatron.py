"""What trainers call on logits whose vocabulary lies on the ranks of Megatron's tensor-parallel group.

Names and arguments are those of Megatron-Core (megatron.core.tensor_parallel) and of verl
(verl.utils.megatron.tensor_parallel). By token_logprobs: one exchange of 16 bytes a row, where Megatron has three of 4,
and verl's entropy three more; the logits are not written to, and results are fp32 (fp64 for fp64 logits).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch.checks import check_tensor
from ..errors import wrong
from ..logprobs.from_logits import token_logprobs

if TYPE_CHECKING:
    from ..distributed import VocabShard

CHUNK = 2048  # verl's argument, which has no effect here


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0, tp_group: Any = None
) -> Tensor:
    """Megatron's: -log p of each target, in its shape.

    Args:
        vocab_parallel_logits: [..., V / W], this rank's columns, with the padding of the vocabulary, which Megatron
            counts as a part of it.
        target: ids of the whole vocabulary, of the shape of the rows, the same on all ranks.
        label_smoothing: 0.
        tp_group: of the ranks; None: Megatron's tensor-parallel group.

    Returns:
        Tensor: fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: for label_smoothing, and on all ranks where they do not agree.
    """
    if label_smoothing != 0:
        raise wrong("label_smoothing", label_smoothing, "0 (Megatron's own smooths over a rank's columns)")
    check_tensor("target", target)
    return -_stats(vocab_parallel_logits, target, ("logp",), tp_group).logp.view(target.shape)


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """verl's: log p of each label, in its shape; as vocab_parallel_cross_entropy."""
    return -vocab_parallel_cross_entropy(logits, labels)


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """verl's: the entropy of each row, [...] of logits [..., V / W]."""
    check_tensor("vocab_parallel_logits", vocab_parallel_logits)
    rows = vocab_parallel_logits.shape[:-1]
    ids = torch.zeros(rows, dtype=torch.int64, device=vocab_parallel_logits.device)
    return _stats(vocab_parallel_logits, ids, ("entropy",), None).entropy.view(rows)


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = CHUNK) -> Tensor:
    """verl's, whose chunks need no memory here."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def tensor_parallel_group() -> Any:
    """Megatron's."""
    return import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()


def even_shard(rows: int, group: Any) -> "VocabShard":
    """Of a vocabulary that Megatron has padded, so that each rank has as many rows: no collective."""
    from ..distributed import VocabShard

    return VocabShard(group, [rows] * group.size())


def _stats(logits: Tensor, ids: Tensor, outputs: tuple[str, ...], group: Any) -> Any:
    check_tensor("vocab_parallel_logits", logits)
    shard = even_shard(logits.shape[-1], tensor_parallel_group() if group is None else group)
    if logits.dim() not in (2, 3):
        logits = logits.reshape(-1, logits.shape[-1])
        ids = ids.reshape(-1)
    return token_logprobs(logits, ids.long(), outputs=outputs, vocab=shard)
