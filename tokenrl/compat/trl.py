"""What TRL 1.16 calls (trl.trainer.utils), computed by token_logprobs; see tokenrl/compat/__init__.py."""

import torch

from ..batch.checks import check_tensor
from .stats import stats_of


def selective_log_softmax(
    logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """TRL: the log-probs of index, [...] or [..., K], under softmax(logits / temperature) (dtype: see above).

    Args:
        logits: bf16, fp16, fp32 or fp64 [..., V].
        index: integers [...], or [..., K] for K ids a row.
        temperature: a number above 0.
        row_mask: of index's shape; where it is zero, so are the result and the gradient.
    """
    return stats_of(logits, index, temperature, row_mask, ("logp",)).logp.view(index.shape)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """TRL: the entropy of softmax(logits), [...], in nats.

    Args:
        logits: bf16, fp16, fp32 or fp64 [..., V].
        chunk_size: no effect: nothing is chunked.
    """
    check_tensor("logits", logits)
    rows = logits.shape[:-1]
    index = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    return stats_of(logits, index, 1.0, None, ("entropy",)).entropy.view(rows)


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL: (log-probs of index [...], entropy [...]) of softmax(logits / temperature) in one pass.

    Args:
        logits: bf16, fp16, fp32 or fp64 [..., V].
        index: integers [...].
        entropy_requires_grad: False gives the entropy without its gradient.
        temperature: a number above 0.
        row_mask: of index's shape; where it is zero, so are both, and the gradient.
    """
    stats = stats_of(logits, index, temperature, row_mask, ("logp", "entropy"))
    entropy = stats.entropy.view(logits.shape[:-1])
    return stats.logp.view(index.shape), entropy if entropy_requires_grad else entropy.detach()
