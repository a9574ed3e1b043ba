"""TRL's fused head by linear_token_logprobs. trl.trainer.utils.add_fused_lm_head gives a model a forward that looks up
ChunkedLogProbFunction by name at each call; the stand-in takes its place there, so that GRPO, RLOO, DPO, KTO, SFT and
AsyncGRPO, built before or after, get it at once and everything around the head (PEFT, MoE losses, sharded heads) stays
TRL's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...logprobs.from_hidden import head_dtype, linear_token_logprobs
from ..heads import check_weight, own_rows, reduce_gradient
from ..hosts import check_parameters, require
from .one_pass import running

# TRL's names of the optional results, in its order -> ours.
RESULTS = {
    "entropy": "entropy", "log_sum_sq_probs": "log_sum_sq_probs", "mean_logits": "mean_logit", "is_top1": "is_top1",
}  # fmt: skip
PARAMETERS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
WITH_GRADIENT = ("logp", "entropy")
_originals: dict[str, Any] = {}


class ChunkedLogProb:
    """What trl.kernels.ChunkedLogProbFunction is to its callers."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(RESULTS),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """(log-probs [N], entropy, log_sum_sq_probs, mean_logits, is_top1), None where not among the outputs.
        chunk_size has no effect: the memory budget decides."""
        for shared in (weight, bias):
            if shared is not None:
                reduce_gradient(shared)
        weight, bias, on_ranks = own_rows(weight, bias)
        head: dict[str, Any] = {
            "bias": bias, "temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale,
            "compute_dtype": head_dtype(hidden), **on_ranks,
        }  # fmt: skip
        if (one_pass := running()) is not None:
            return *one_pass.apply(hidden, weight, targets, **head), None, None, None
        check_weight(weight)  # one pass has its gradients before TRL lets go of a gathered weight
        asked = ["logp", *(ours for theirs, ours in RESULTS.items() if theirs in outputs)]
        found = linear_token_logprobs(hidden, weight, targets, outputs=asked, **head)
        values = {name: x if name in WITH_GRADIENT else x.detach() for name, x in zip(asked, found, strict=True)}
        return tuple(values.get(name) for name in ("logp", *RESULTS.values()))


def patch_trl_head() -> None:
    """All fused heads of TRL in this process by linear_token_logprobs, from trl 1.15 on. Again: no effect."""
    require("trl-head")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    if _originals:
        return
    check_parameters("trl.kernels.ChunkedLogProbFunction.forward", ChunkedLogProbFunction.forward, PARAMETERS)
    stand_ins: dict[str, Any] = {"_ChunkedLogProbFunction": ChunkedLogProb}
    if hasattr(utils, "_use_triton"):  # trl 1.16 scores masked positions too where this is false
        stand_ins["_use_triton"] = lambda device: True
    for name, stand_in in stand_ins.items():
        _originals[name] = getattr(utils, name)
        setattr(utils, name, stand_in)


def unpatch_trl_head() -> None:
    """TRL's own head again."""
    from trl.trainer import utils

    while _originals:
        setattr(utils, *_originals.popitem())


@contextmanager
def fused_head(wanted: bool) -> Iterator[None]:
    """With the head of a trainer that asks for it, whatever other trainers have."""
    changes = wanted and not _originals
    if changes:
        patch_trl_head()
    try:
        yield
    finally:
        if changes:
            unpatch_trl_head()
