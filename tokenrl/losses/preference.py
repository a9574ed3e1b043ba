"""preference_loss: a row of the table of preference objectives on a batch of chosen and rejected sequences."""

from typing import NamedTuple

from torch import Tensor

from ..batch.checks import check_floats, check_tensor
from ..batch.layout import layout_of
from ..objectives.preference import Preference, preference
from ..observed import observed
from ..ops import preference_dispatch as dispatch
from ..ops.backends import Backend
from ..ops.preference_reference import PreferenceInputs
from .policy_arguments import BatchOnRanks, as_batch_on_ranks
from .preference_arguments import check_needed, preference_inputs


class PreferenceMetrics(NamedTuple):
    """Without gradient, on the device: nothing waits for it until a number is read.

    chosen_rewards, rejected_rewards: [P], beta times the row's statistic, with the divergences of a row that has them.
    margins: [P], their difference. accuracy: 0-d, the share of pairs whose margin is above 0. Of labelled sequences the
    first three are [S], NaN where there is none: rewards on their own side, margins to beta kl or the reward shift,
    those of undesirable sequences with their sign turned.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


@observed
def preference_loss(
    objective: str | Preference,
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    desirable: Tensor | None = None,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | None = None,
    divergence: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    context: BatchOnRanks | None = None,
    check: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, PreferenceMetrics]:
    """The loss of a policy on pairs of sequences, of which one is preferred, or on labelled ones.

        x(y) = sum_t w_t (logp_t - ref_logp_t), for means over its tokens;
               + divergence sum_t v_t D_t + length |y| / beta, of rows that have these
        loss = sum_p c_p link(x_w, x_l) / P + nll mean_t -logp_t

    logp, divergence, token_weight and divergence_weight get gradients where they require them. Sums are fp64.

    Args:
        objective: a name in tokenrl.PREFERENCES, or what tokenrl.preference(name, ...) returns.
        logp: fp32 or fp64, padded [B, T], or packed [N] with cu_seqlens [S + 1]: log-probs of all sequences, by
            token_logprobs or linear_token_logprobs.
        ref_logp: of the reference, of the same shape, constant; None for rows without one.
        mask: bool, the tokens of the answers; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        pairs: integers [P, 2], of each pair the chosen and the rejected sequence; None: halves, sequence i of the first
            half is chosen and meets sequence i of the second. Sequences that no pair names enter nothing but nll_mask.
        desirable: bool [S], of "kto", "apo_zero_unpaired" and "bco_unpaired", instead of pairs.
        kl: of "kto", what a log ratio is compared with, max(0, mean kl): a number, a 0-d tensor, or the [K] log ratios
            of mismatched sequences. Constant.
        reward_shift: of "bco_unpaired", likewise, what rewards, beta times a log ratio, are compared with: their mean
            over the batches so far; None: that of this batch. Constant.
        divergence: of the tdpo and sparsepo rows, one per token, such as tokenrl.token_divergence(logits, ref_logits),
            KL of the reference to the policy.
        token_weight: w, of the shape of logp; None for 1.
        divergence_weight: v, likewise.
        pair_weight: constant, c of [P] ([S] of labelled sequences, such as BCO's weights by density ratio).
        nll_mask: bool of the tokens of the nll term; None: those of chosen sequences.
        normalizer: what to divide by instead of P.
        nll_normalizer: what to divide by instead of the number of tokens of the nll term.
        context: as for policy_loss: logp and divergence are [n], of this rank's tokens of a packed batch, all else is
            of the whole batch; the way of "aot" and of "bco_unpaired" without a reward_shift to a batch on
            data-parallel ranks, too. Where pairs add up the parts take normalizer (and nll_normalizer), such as
            tokenrl.distributed.global_count, instead.
        check: as for policy_loss.
        backend: "cuda", "cpu", "triton", "reference"; None takes TOKENRL_BACKEND, else the first that can run. Kernels
            differentiate once, and have no links of one's own and no gradient of the token_weight of an "aot" row with
            ref_logp.

    Returns:
        (loss 0-d in the dtype of logp, PreferenceMetrics).

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
        RuntimeError: with every backend's reason, when none can run the call.
    """
    row = preference(objective)
    if context is not None:
        check_tensor("logp", logp)
        logp, divergence = as_batch_on_ranks(context).of_batch(logp, divergence, check, "divergence")
    check_floats("logp", logp)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_needed(row, "divergence", divergence, row.divergence > 0)
    if divergence is not None:
        check_floats("divergence", divergence)
        divergence = layout.flat_tokens("divergence", divergence)
    inputs = preference_inputs(
        row, layout, ref_logp=ref_logp, pairs=pairs, desirable=desirable, kl=kl, reward_shift=reward_shift,
        token_weight=token_weight, divergence_weight=divergence_weight, pair_weight=pair_weight, nll_mask=nll_mask,
        normalizer=normalizer, nll_normalizer=nll_normalizer,
    )  # fmt: skip
    return evaluate(dispatch.backend_of(backend, inputs), inputs, layout.flat_tokens("logp", logp), divergence)


def evaluate(
    chosen: Backend, inputs: PreferenceInputs, logp: Tensor, divergence: Tensor | None
) -> tuple[Tensor, PreferenceMetrics]:
    """The loss of log-probs and divergences [N]."""
    loss, rewards, accuracy = dispatch.preference(chosen, inputs, logp, divergence)
    of_chosen, of_rejected, margins = rewards.unbind()
    return loss, PreferenceMetrics(of_chosen, of_rejected, margins, accuracy)
