"""verl's fused head by linear_token_logprobs, and its log-prob and entropy functions by tokenrl.compat."""

from importlib import import_module
from typing import Any

from torch import Tensor

from ... import compat
from ...compat import megatron
from ...logprobs.from_hidden import head_dtype, linear_token_logprobs
from ..heads import check_weight, sums_its_gradient
from ..hosts import check_parameters, rebind
from ..lazy import when_imported

FUSED, KERNEL = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
FUNCTIONS = "verl.utils.torch_functional"
FORWARD = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
NAMES = {  # verl's -> tokenrl.compat's
    "logprobs_from_logits": compat.logprobs_from_logits,
    "entropy_from_logits": compat.entropy_from_logits,
    "entropy_from_logits_with_chunking": compat.entropy_from_logits,
}
# Of verl's Megatron engine, whose vocabulary lies on the ranks of a group.
ON_RANKS = "verl.utils.megatron.tensor_parallel"
NAMES_ON_RANKS = {
    name: getattr(megatron, name)
    for name in (
        "vocab_parallel_log_probs_from_logits", "vocab_parallel_entropy", "vocab_parallel_entropy_with_chunking",
    )
}  # fmt: skip
_heads: dict[str, Any] = {}
_functions: dict[str, Any] = {}
_on_ranks: dict[str, Any] = {}


def head(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float | Tensor, **vocab: Any
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), fp32 (fp64 for fp64), of hidden's rows. ids come shifted from verl. Autocast is
    followed, as verl's matmul does. temperature: a number, one per row, or [B] for [B, T] rows. vocab: what
    linear_token_logprobs takes where the vocabulary lies on several ranks."""
    check_weight(weight)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.reshape(*temperature.shape, *(1,) * (ids.dim() - temperature.dim())).expand(ids.shape)
    how = {"temperature": temperature, "compute_dtype": head_dtype(hidden), **vocab}
    found = linear_token_logprobs(hidden, weight, ids.long(), **how)
    return found.logp, found.entropy


def forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """FusedLinearForPPO.forward, of either of its backends."""
    return head(hidden_states, vocab_weights, input_ids, temperature)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """verl's Triton head: flat results; reduced ones by verl's own. dist_process_group: of the ranks that each hold as
    many rows of the vocabulary. Megatron's sequence parallelism sums hidden's gradient as it scatters it; where nobody
    does, the head sums it."""
    if reduction != "none":
        return _heads[KERNEL](hidden, weight, labels, temperature, reduction, dist_process_group)
    vocab: dict[str, Any] = {}
    if dist_process_group is not None:
        shard = megatron.even_shard(weight.shape[0], dist_process_group)
        vocab = {"vocab": shard, "reduce_hidden_grad": not sums_its_gradient(hidden)}
    return head(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature, **vocab)


def fuse() -> None:
    """The head of all models that verl runs with use_fused_kernels, its impl_backend torch, liger or triton, is
    linear_token_logprobs. Again: no effect."""
    if _heads:
        return
    fused, kernel = import_module(FUSED).FusedLinearForPPO, import_module(KERNEL)
    check_parameters("FusedLinearForPPO.forward", fused.forward, FORWARD)
    _heads.update({FUSED: fused.forward, KERNEL: kernel.linear_cross_entropy})
    fused.forward = forward
    rebind("verl", {"linear_cross_entropy": _heads[KERNEL]}, {"linear_cross_entropy": linear_cross_entropy})


def unfuse() -> None:
    """verl's own heads again."""
    if _heads:
        import_module(FUSED).FusedLinearForPPO.forward = _heads[FUSED]
        rebind("verl", {"linear_cross_entropy": linear_cross_entropy}, {"linear_cross_entropy": _heads[KERNEL]})
        _heads.clear()


def patch() -> None:
    """logprobs_from_logits, entropy_from_logits and entropy_from_logits_with_chunking of verl become tokenrl.compat's,
    wherever verl has imported them, and those of its Megatron engine tokenrl.compat.megatron's, when that is loaded.
    Again: no effect, but for modules loaded since."""
    found = import_module(FUNCTIONS)
    if not _functions:
        _functions.update({name: getattr(found, name) for name in NAMES if hasattr(found, name)})
    rebind("verl", _functions, NAMES)
    when_imported(ON_RANKS, _patch_on_ranks)


def _patch_on_ranks(module: Any) -> None:
    if not _functions:
        return  # unpatch was called before it was loaded
    if not _on_ranks:
        _on_ranks.update({name: getattr(module, name) for name in NAMES_ON_RANKS if hasattr(module, name)})
    rebind("verl", _on_ranks, NAMES_ON_RANKS)


def unpatch() -> None:
    """verl's own functions again."""
    rebind("verl", {name: NAMES[name] for name in _functions}, _functions)
    _functions.clear()
    rebind("verl", {name: NAMES_ON_RANKS[name] for name in _on_ranks}, _on_ranks)
    _on_ranks.clear()
