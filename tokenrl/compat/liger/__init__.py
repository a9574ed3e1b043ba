"""Drop-ins for losses of Liger-Kernel 0.8.5 (liger_kernel.chunked_loss, liger_kernel.transformers).

The names, the arguments and the numbers are Liger's. What differs, always:
- results and sums of gradients are fp32 for 16-bit tensors (fp64 for fp64);
- what an option switches in Liger's code and not in its numbers (compiled, chunk_size) has no effect;
- masks hold zeros and ones; what they leave out, and ids of ignore_index, may hold anything;
- what tokenrl does not compute raises a ValueError that names it.
"""

from .cross_entropy import (
    CrossEntropyOutput,
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
    liger_cross_entropy,
    liger_fused_linear_cross_entropy,
)
from .grpo import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss
from .preference import LigerFusedLinearDPOLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "fused_selective_log_softmax",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "triton_grpo_loss",
]
