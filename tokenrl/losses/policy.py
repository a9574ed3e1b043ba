"""policy_loss: a row of the table of objectives, run on a batch."""

from torch import Tensor

from ..batch.checks import check_floats, check_tensor
from ..batch.layout import layout_of
from ..errors import wrong
from ..objectives.metrics import Metrics, TermMetrics
from ..objectives.policy import Objective, find_objective
from ..observed import observed
from ..ops import backends, dispatch
from .policy_arguments import BatchOnRanks, as_batch_on_ranks, corrected, policy_loss_inputs
from .regularizers import regularizers_of


@observed
def policy_loss(
    objective: str | Objective,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    segment_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl: str | Objective = "kl_k3",
    kl_coef: float = 0.0,
    kl_weight: Tensor | None = None,
    kl_ratio: str | None = None,
    entropy_coef: float = 0.0,
    entropy_weight: Tensor | None = None,
    correction: dict | None = None,
    context: BatchOnRanks | None = None,
    check: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of a policy objective and its metrics.

        loss = sum_t w_t (gate(s_t) + kl_coef r_t kl_t - entropy_coef entropy_t),   s a statistic of the log ratios

    The forward saves one number per token, the backward is one multiplication; forms (tokenrl/objectives/forms/base.py)
    and the terms add torch's own. Differentiating twice raises.

    Args:
        objective: a name in tokenrl.OBJECTIVES, or what tokenrl.objective(name, ...) returns.
        logp: fp32 or fp64 log-probs of the sampled tokens, [B, T], or packed [N] with cu_seqlens [S + 1]. It and
            entropy get a gradient, nothing else.
        old_logp: of logp's shape; None means on-policy, logp without its gradient. For kl_* it is the reference
            model's.
        advantages: [B] (or [S]), or one per token; None for objectives that use none.
        mask: bool, of logp's shape: the tokens that enter the ratio and pay the loss. Masked cells may hold anything; a
            hole (tool output) inside a sequence adds nothing to a prefix and does not advance the position.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: "sequence" or "token", where a packed batch has as many of both; None: by their shape, and one
            per token where both fit.
        segment_ids: integers of logp's shape; the statistic then runs over each run of equal ids inside a sequence
            instead of over the sequence.
        group_ids: integers [B] (or [S]), rollouts of one prompt share one; for "group-mean" and "balanced".
        entropy: of logp's shape, of the whole vocabulary as tokenrl.token_logprobs gives it.
        rollout_logp: the log-probs of the engine that sampled, of logp's shape: the weights of the loss are multiplied
            by tokenrl.corrections.importance_weights of old_logp (on-policy: logp) to them; "vespo" takes the weights
            into its ratio instead. A NaN, a token that the engine did not score, raises, but for correction={...,
            "unknown": "neutral"}, which gives it a ratio of 1.
        token_weight: of logp's shape, or [B, 1], multiplies the loss (importance weights, entropy masks), never the
            ratio.
        aggregation: a mode of tokenrl.aggregation_weights; None takes the objective's own.
        normalizer: the global count that the mode divides by (a number or a 0-d tensor), so that the parts of a split
            batch add up.
        ref_logp: log-probs of the reference model, of logp's shape.
        kl: a row kl_* of the table, of logp and ref_logp.
        kl_coef: its weight.
        kl_weight: of logp's shape, or [B, 1]: what stands for w_t in that term, as tokenrl.aggregation_weights gives
            it; None: w_t, the weight of the aggregation times token_weight.
        kl_ratio: what corrects that estimate, which is one of the current policy, for tokens of the old one: r_t = the
            ratio to old_logp of the "token" (DeepSeek-V3.2) or e^"span_mean" of its sequence or segment (TRL), with the
            ratio's own gradient, on-policy too; None: r_t = 1.
        entropy_coef: the weight of the entropy bonus.
        entropy_weight: as kl_weight, of that term.
        correction: arguments of importance_weights, level, bound, low, high, ...; None: of single tokens, truncated at
            2.
        context: a tokenrl.distributed.ContextShard: logp and entropy are [n], of this rank's tokens of a packed batch
            whose tokens lie on several ranks; all else is of the whole batch, the same on each rank, and so are loss
            and metrics. One exchange of 4 bytes a token, none in the backward, which gives each rank the gradient of
            its own tokens.
        check: that the ranks agree on the batch, by an exchange of 256 bytes before it.
        backend: "cuda", "cpu", "triton", "reference"; None takes TOKENRL_BACKEND, else the first that can run.

    Returns:
        (loss 0-d, Metrics; TermMetrics where ref_logp or entropy is given).

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
        RuntimeError: with every backend's reason, when none can run the call.
    """
    if context is not None:
        check_tensor("logp", logp)
        logp, entropy = as_batch_on_ranks(context).of_batch(logp, entropy, check)
    row, layout = find_objective(objective), layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_floats("logp", logp)
    chosen = backends.choose(backend, logp.device, row.gate.name)
    old_logp, token_weight = corrected(
        row, layout, old_logp, logp, rollout_logp, segment_ids, token_weight, correction, kl_ratio
    )
    regularizers = regularizers_of(
        layout, logp.dtype, ref_logp=ref_logp, kl=kl, kl_coef=kl_coef, kl_weight=kl_weight, kl_ratio=kl_ratio,
        entropy_coef=entropy_coef, entropy_weight=entropy_weight,
    )  # fmt: skip
    inputs = policy_loss_inputs(
        row, layout, logp.dtype, chosen, old_logp=old_logp, advantages=advantages, advantages_per=advantages_per,
        token_weight=token_weight, segment_ids=segment_ids, group_ids=group_ids, aggregation=aggregation,
        normalizer=normalizer, regularizers=regularizers,
    )  # fmt: skip
    if entropy is None and entropy_coef != 0:
        raise wrong("entropy", None, f"one entropy per token, {list(layout.shape)}; entropy_coef is {entropy_coef}")
    if entropy is not None:
        check_floats("entropy", entropy)
        entropy = layout.flat_tokens("entropy", entropy, logp.dtype)
    loss, raw = dispatch.policy_loss(chosen, layout, layout.flat_tokens("logp", logp), entropy, inputs)
    return loss, Metrics(raw) if ref_logp is None and entropy is None else TermMetrics(raw)
