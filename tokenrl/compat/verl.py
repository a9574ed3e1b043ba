"""What verl calls (verl.utils.torch_functional), computed by token_logprobs; see tokenrl/compat/__init__.py."""

import torch

from ..batch.checks import check_tensor
from .stats import may_be_in_place, stats_of


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """verl: the log-probs of labels, in their shape.

    Args:
        logits: bf16, fp16, fp32 or fp64 [..., V].
        labels: integers [...].
        inplace_backward: permits the gradient to lie in the memory of the logits. It is used where the logits are the
            output of an operation of torch, or a view of one, that the operation does not need for its own backward,
            their elements do not overlap, their last stride is 1, the call runs eagerly and on a kernel backend;
            elsewhere, and so behind a compiled head, an autograd.Function or a write through a view, the gradient is
            fresh. An operation beside this one that saved the logits then raises in its backward, as autograd does
            after any write.
    """
    check_tensor("logits", logits)
    check_tensor("labels", labels)
    inplace_backward = inplace_backward and may_be_in_place(logits)
    return stats_of(logits, labels, 1.0, None, ("logp",), inplace_backward, "labels").logp.view(labels.shape)
