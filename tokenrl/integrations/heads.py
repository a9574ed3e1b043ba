"""What the hooks into heads of models share."""

import torch
from torch import Tensor

from ..errors import wrong


def head_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a model's own GEMM: autocast's, which leaves fp64 alone, else that of hidden."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def check_weight(weight: Tensor) -> None:
    """Our backward reads the weight again, after a shard that was gathered around the forward is gone."""
    if hasattr(weight, "ds_status"):
        accepted = "a whole tensor (a smaller ZeRO stage, FSDP, or the host's own head)"
        raise wrong("lm_head.weight", "a partition of DeepSpeed's ZeRO-3", accepted)
