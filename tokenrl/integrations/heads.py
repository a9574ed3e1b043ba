"""What the hooks into heads of models share."""

import math
from typing import Any

from torch import Tensor, distributed

from ..errors import wrong


def check_weight(weight: Tensor) -> None:
    """Our backward reads the weight again, after a shard that was gathered around the forward is gone."""
    if hasattr(weight, "ds_status"):
        accepted = "a whole tensor (a smaller ZeRO stage, FSDP, or the host's own head)"
        raise wrong("lm_head.weight", "a partition of DeepSpeed's ZeRO-3", accepted)


TENSOR_PARALLEL = "tp"  # the dimension's name in meshes of accelerate, transformers and torchtitan
SUMMED = "GatherFromSequenceParallelRegion"  # Megatron's, whose backward sums over the ranks and scatters


def sums_its_gradient(hidden: Tensor) -> bool:
    """Whether the gradients that the ranks of a tensor-parallel group hand to hidden are summed on their way."""
    return hidden.grad_fn is not None and SUMMED in hidden.grad_fn.name()


def reduce_gradient(weight: Tensor) -> None:
    """The gradient of a weight that the host has gathered by DTensor.full_tensor(), a head that is a shard of FSDP2 by
    itself, becomes the mean over the processes, as FSDP makes those that it gathers. full_tensor's backward takes it
    for the same in all of them, and would keep of each process's own the part that is its shard. Ranks of a
    tensor-parallel group have the same tokens, of which there is nothing to average."""
    spec = getattr(weight.grad_fn, "dtensor_spec", None)
    if spec is None:
        return
    mesh, names = spec.mesh, spec.mesh.mesh_dim_names or ()
    others = [dim for dim in range(mesh.ndim) if dim >= len(names) or names[dim] != TENSOR_PARALLEL]

    def mean(gradient: Tensor) -> Tensor:
        whole = gradient / math.prod(mesh.size(dim) for dim in others)
        for dim in others:
            distributed.all_reduce(whole, group=mesh.get_group(dim))
        return whole

    if others:
        weight.register_hook(mean)


def own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """(weight, bias, what the ops take beside them), of the whole head or, where the host has gathered it over a
    tensor-parallel group by DTensor.full_tensor(), of this rank's rows: its ranks have the same tokens, and need not
    each compute all of the vocabulary."""
    node = weight.grad_fn
    gather = None if node is None or not hasattr(node, "dtensor_spec") else node.next_functions[0][0]
    spec = getattr(gather, "current_spec", None)  # of the weight before
    names = () if spec is None else spec.mesh.mesh_dim_names or ()
    if spec is None or TENSOR_PARALLEL not in names:
        return weight, bias, {}
    dim = names.index(TENSOR_PARALLEL)
    if not spec.placements[dim].is_shard(0) or spec.mesh.size(dim) == 1:
        return weight, bias, {}
    from ..distributed import VocabShard

    shard = VocabShard.even(weight.shape[0], spec.mesh.get_group(dim))
    rows = slice(shard.start, shard.start + shard.size)
    return weight[rows], None if bias is None else bias[rows], {"vocab": shard}


def local_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """As own_rows, of a head that its ranks hold side by side as DTensors, which nobody has gathered."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return weight, bias, {}
    names = mesh.mesh_dim_names or ()
    if TENSOR_PARALLEL not in names:
        accepted = f"a whole tensor, or a DTensor of a mesh with a dimension {TENSOR_PARALLEL!r}"
        raise wrong("lm_head.weight", f"a DTensor of a mesh with dimensions {names}", accepted)
    from torch.distributed.tensor import DTensor

    from ..distributed import VocabShard

    shard = VocabShard.of_dtensor(weight)
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    return own, bias.to_local() if isinstance(bias, DTensor) else bias, {"vocab": shard}
