"""What the ops that start from hidden states are compared with: TRL's chunked op and Liger's fused GRPO loss."""

import functools

import torch
from torch import Tensor

from .case import Case
from .competitors import Competitor, compiled, first_line, why_not
from .eager import eager_ctpo

LIGER_IS_GRPO = "its loss is GRPO, not CTPO, on the same inputs and mask: compared in time and memory, not in results"


def trl_chunked(
    hidden: Tensor, weight: Tensor, ids: Tensor, outputs: tuple[str, ...], *, bias: Tensor | None = None,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
) -> tuple:  # fmt: skip
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, temperature, _CHUNKED_LOGPROB_CHUNK_SIZE, softcap, logit_scale, outputs
    )  # fmt: skip


def trl_linear_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy, *_ = trl_chunked(hidden, weight, ids, ("entropy",))
    return logp, entropy


def trl_linear_ctpo(
    hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor]:
    """Like TRL's trainer, of the active tokens where it has Triton and of all tokens elsewhere."""
    from trl.kernels.chunked_logprob import _use_triton

    if _use_triton(hidden.device):
        active, *_ = trl_chunked(hidden[mask], weight, ids[mask], ())
        logp = active.new_zeros(mask.shape).masked_scatter(mask, active)
    else:
        logp, *_ = trl_chunked(hidden.flatten(0, -2), weight, ids.flatten(), ())
        logp = logp.view(mask.shape).masked_fill(~mask, 0)
    return eager_ctpo(logp, old_logp, advantages, mask)


def trl(call) -> Competitor:
    reason = why_not("trl", "1.16.0", "trl.kernels", "ChunkedLogProbFunction")
    reason = reason or why_not("trl", "1.16.0", "trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    return Competitor("TRL", None if reason else call, reason)


def liger_grpo(
    compiled: bool, hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=compiled, use_ref_model=False, loss_type="grpo")
    # A mask of bools has torch.compile compile anew in every call.
    return (loss(hidden, weight, ids, mask.float(), advantages, old_per_token_logps=old_logp)[0],)


def liger_why_not_compiled(case: Case) -> str | None:
    """Why Liger's loss does not run as it is by default, compiled, or None.

    Asked of the whole case and of nothing before it: compiled for a second length it fails (torch 2.13).
    """
    torch._dynamo.reset()
    try:
        liger_grpo(True, *case.inputs)
    except Exception as error:  # whatever stops somebody else's code is the reason
        return first_line(error)
    return None


def liger(case: Case) -> Competitor:
    reason = why_not("liger-kernel", "0.8.5", "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if reason:
        return Competitor("Liger", None, reason)
    failed = liger_why_not_compiled(case)
    remark = LIGER_IS_GRPO + (f"; compiled=False, since compiled it fails: {failed}" if failed else "")
    call = functools.partial(liger_grpo, failed is None)
    return Competitor("Liger", call, forward=False, comparable=False, remark=remark)


def linear_competitors(case: Case, device: str, compile: bool) -> list[Competitor]:
    """Those of a case, in the order of the table."""
    found = [Competitor("eager", case.eager)]
    if device == "cpu" and compile:
        reason = "left out on the CPU: compiling it for each case would take minutes of the run"
        found.append(Competitor("compile", None, reason))
    else:
        found.append(compiled(case, compile))
    if case.op == "linear_token_logprobs":
        return [*found, trl(trl_linear_logprobs)]
    return [*found, trl(trl_linear_ctpo), liger(case)]
