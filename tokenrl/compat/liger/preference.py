"""Liger's DPO from hidden states: linear_preference_loss of halves."""

import torch
from torch import Tensor

from ...batch.checks import check_name, check_number, check_tensor
from ...errors import wrong
from ...logprobs.from_hidden import head_dtype, linear_token_logprobs
from ...losses.linear_preference import linear_preference_loss
from ...objectives.preference import preference
from ...ops.linear.gemm import sum_dtype


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """Liger: DPO from hidden states whose first half of rows was chosen and whose second half was rejected.

        loss = -mean log sigmoid(beta (chosen - rejected)) + alpha nll,   of the pairs' log-ratios to the reference

    forward(lin_weight [V, D], _input [2 B, T, D], target [2 B, T], bias, ref_input, ref_weight, ref_bias) returns
    (loss, (chosen log-probs [B], rejected ones [B], mean logit of the chosen and of the rejected rows, the chosen
    tokens' mean nll, chosen rewards [B], rejected rewards [B])); target is aligned with _input. average_log_prob: means
    over tokens in place of sums. nll is 0 without compute_nll_loss. Only the loss has gradients. compiled and
    chunk_size have no effect; label_smoothing and discopop_tau are of other loss types.
    Errors: ValueError naming the argument; so for another loss_type than "sigmoid".

    Source: DPO, arXiv 2305.18290 (trainers).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        check_name("loss_type", loss_type, ("sigmoid",))
        check_number("beta", beta)
        check_number("alpha", alpha)
        self.row = preference(
            "dpo", beta=beta, statistic="mean" if average_log_prob else "sum",
            reference="given" if use_ref_model else "none", nll=alpha if compute_nll_loss else 0.0,
        )  # fmt: skip
        self.ignore_index = ignore_index
        self.compute_nll_loss, self.use_ref_model = compute_nll_loss, use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_tensor("target", target)
        if target.dim() != 2 or len(target) % 2 or not len(target):
            raise wrong("target", f"shape {list(target.shape)}", "[2 B, T]: chosen rows, then as many rejected ones")
        loss, metrics = linear_preference_loss(
            self.row, _input, lin_weight, target, self._ref_logp(target, ref_input, ref_weight, ref_bias), bias=bias,
            ignore_index=self.ignore_index, compute_dtype=head_dtype(_input),
        )  # fmt: skip
        counts = (target != self.ignore_index).sum(1)
        sums, nll = metrics.logp.sum(1), metrics.logp.new_zeros(())
        if self.compute_nll_loss:
            nll = -sums.chunk(2)[0].sum() / counts.chunk(2)[0].sum()
        if self.average_log_prob:
            sums = sums / counts
        rewards = (x.to(sums.dtype) for x in (metrics.chosen_rewards, metrics.rejected_rewards))
        return loss, (*sums.chunk(2), *_mean_logits(_input, lin_weight, bias), nll, *rewards)

    @torch.no_grad()
    def _ref_logp(
        self, target: Tensor, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor | None:
        if not self.use_ref_model:
            return None
        if hidden is None or weight is None:
            raise wrong("ref_input, ref_weight", None, "the reference model's, or use_ref_model=False")
        return linear_token_logprobs(
            hidden, weight, target, bias=bias, ignore_index=self.ignore_index, outputs=("logp",),
            compute_dtype=head_dtype(hidden),
        ).logp  # fmt: skip


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Of the chosen rows and of the rejected ones, all tokens and the whole vocabulary; no logits are needed for it."""
    dtype = sum_dtype(hidden.dtype)
    mean, offset = weight.mean(0, dtype=dtype), 0.0 if bias is None else bias.mean(dtype=dtype)
    return [half.mean((0, 1), dtype=dtype) @ mean + offset for half in hidden.chunk(2)]
