"""What the ops from hidden states are compared with: each a call on (hidden, weight), or why it cannot run."""

from torch import Tensor

from .competitors import Competitor, first_line, version
from .heads import HeadCase, eager_logprobs

TRL_COLUMNS = 16384  # of a tile, as TRL's trainer calls its op


def trl_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, TRL_COLUMNS, None, 1.0, ("entropy",)
    )
    return logp, entropy


def liger_grpo(case: HeadCase, compiled: bool):
    """Liger has no ctpo: its fused GRPO loss on the same tensors."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo", compiled=compiled)
    batch = case.mask.shape

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
        given = (case.ids.view(batch), case.mask.to(hidden.dtype), case.advantages)
        value, _ = loss(hidden.view(*batch, -1), weight, *given, old_per_token_logps=case.old_logp)
        return (value,)

    return call


def trl(case: HeadCase) -> Competitor:
    found = version("trl")
    if found is None:
        return Competitor("TRL", None, "trl is not installed (pip install trl==1.16.0)")
    try:
        from trl.kernels import ChunkedLogProbFunction  # noqa: F401
    except Exception as error:  # whatever a foreign package's import raises is the reason
        return Competitor("TRL", None, f"trl {found} has no chunked op: {first_line(error)}")
    return Competitor("TRL", case.with_logprobs(trl_logprobs))


def liger(case: HeadCase, compiled: bool) -> Competitor:
    found = version("liger-kernel")
    if found is None:
        return Competitor("Liger", None, "liger-kernel is not installed (pip install liger-kernel==0.8.5)")
    if case.op != "linear_policy_loss":
        return Competitor("Liger", None, f"liger-kernel {found} has no log-probs from hidden states on this device")
    try:
        return Competitor("Liger", liger_grpo(case, compiled))
    except Exception as error:  # whatever a foreign package's import raises is the reason
        return Competitor("Liger", None, f"liger-kernel {found}: {first_line(error)}")


def head_rivals(case: HeadCase, compile: bool) -> list[Competitor]:
    """Those of a case; of the masked variant only eager, as the others compute masked tokens as they do all."""
    eager = Competitor("eager", case.with_logprobs(eager_logprobs))
    if case.variant:
        return [eager]
    return [eager, trl(case), liger(case, compile)]
