"""Drop-ins: what TRL 1.16 (trl.trainer.utils) and verl (verl.utils.torch_functional) call, computed by token_logprobs.

The names, the arguments and the numbers are theirs. What differs, always:
- results are fp32 for 16-bit logits (TRL's torch code returns the dtype of the logits), fp64 for fp64 ones;
- -inf logits have no part in the entropy, which TRL's torch code makes nan;
- an id of -100 gives 0 and no gradient, and a row without any other id is never read.
Logits with 2 or 3 dimensions are read in place, strided views too; with more they are reshaped, which may copy.
"""

import torch

from . import backends
from .errors import wrong
from .logprobs import IGNORED, TokenStats, token_logprobs, why_not_inplace


def selective_log_softmax(
    logits: torch.Tensor, index: torch.Tensor, temperature: float = 1.0, row_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """TRL: the log-probs of index, [...] or [..., K], under softmax(logits / temperature) (dtype: see above).

    row_mask: of index's shape; where it is zero, so are the result and the gradient.
    """
    return _stats(logits, index, temperature, row_mask, ("logp",)).logp.view(index.shape)


def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
    """TRL: the entropy of softmax(logits), [...]. chunk_size has no effect: nothing is chunked."""
    rows = logits.shape[:-1]
    index = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    return _stats(logits, index, 1.0, None, ("entropy",)).entropy.view(rows)


def selective_log_softmax_and_entropy(
    logits: torch.Tensor,
    index: torch.Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL: (log-probs of index [...], entropy [...]) of softmax(logits / temperature) in one pass; both zero where
    row_mask, of index's shape, is."""
    stats = _stats(logits, index, temperature, row_mask, ("logp", "entropy"))
    entropy = stats.entropy.view(logits.shape[:-1])
    return stats.logp.view(index.shape), entropy if entropy_requires_grad else entropy.detach()


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """verl: the log-probs of labels, in their shape.

    inplace_backward permits the gradient to lie in the memory of the logits. It is used where the logits are an
    operation's output, or a view of one, that the operation does not need for its own backward, their elements do not
    overlap, their last stride is 1, the call runs eagerly and on a kernel backend; elsewhere the gradient is fresh. An
    operation beside this one that saved the logits then raises in its backward, as autograd does after any write.
    """
    chosen = backends.choose(None, logits.device)
    inplace_backward = inplace_backward and why_not_inplace(logits, chosen) is None
    return _stats(logits, labels, 1.0, None, ("logp",), inplace_backward).logp.view(labels.shape)


def _stats(
    logits: torch.Tensor,
    index: torch.Tensor,
    temperature: float,
    row_mask: torch.Tensor | None,
    outputs: tuple[str, ...],
    inplace_backward: bool = False,
) -> TokenStats:
    rows = logits.shape[:-1]
    if index.shape[: len(rows)] != rows or index.dim() > logits.dim():
        raise wrong("index", f"shape {list(index.shape)}", f"one id per row of logits, {list(rows)}, or K of them")
    if row_mask is not None:
        if row_mask.shape != index.shape:
            raise wrong("row_mask", f"shape {list(row_mask.shape)}", f"the shape of index, {list(index.shape)}")
        index = index.masked_fill(row_mask == 0, IGNORED)
    if logits.dim() not in (2, 3):
        index = index.reshape(rows.numel(), *index.shape[len(rows) :])
        logits = logits.reshape(rows.numel(), logits.shape[-1])
    return token_logprobs(logits, index, temperature=temperature, outputs=outputs, inplace_backward=inplace_backward)
