"""What the hooks into heads of models share."""

from torch import Tensor

from ..errors import wrong


def check_weight(weight: Tensor) -> None:
    """Our backward reads the weight again, after a shard that was gathered around the forward is gone."""
    if hasattr(weight, "ds_status"):
        accepted = "a whole tensor (a smaller ZeRO stage, FSDP, or the host's own head)"
        raise wrong("lm_head.weight", "a partition of DeepSpeed's ZeRO-3", accepted)
