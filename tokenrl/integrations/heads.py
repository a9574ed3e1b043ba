"""What the hooks into heads of models share."""

from torch import Tensor, distributed

from ..errors import wrong


def check_weight(weight: Tensor) -> None:
    """Our backward reads the weight again, after a shard that was gathered around the forward is gone."""
    if hasattr(weight, "ds_status"):
        accepted = "a whole tensor (a smaller ZeRO stage, FSDP, or the host's own head)"
        raise wrong("lm_head.weight", "a partition of DeepSpeed's ZeRO-3", accepted)


def reduce_gradient(weight: Tensor) -> None:
    """The gradient of a weight that the host has gathered by DTensor.full_tensor(), a head that is a shard of FSDP2 by
    itself, becomes the mean over the processes, as FSDP makes those that it gathers. full_tensor's backward takes it
    for the same in all of them, and would keep of each process's own the part that is its shard."""
    spec = getattr(weight.grad_fn, "dtensor_spec", None)
    if spec is None:
        return

    def mean(gradient: Tensor) -> Tensor:
        whole = gradient / spec.mesh.size()
        for dim in range(spec.mesh.ndim):
            distributed.all_reduce(whole, group=spec.mesh.get_group(dim))
        return whole

    weight.register_hook(mean)
