"""InTRO: rationales learn from the model itself once it has seen the answer.

    ids = candidates(logits, response_ids, 5, row_mask=mask)
    logp = token_logprobs(logits, ids, outputs=["logp"]).logp              # or linear_token_logprobs
    posterior = token_logprobs(posterior_logits, ids, outputs=["logp"]).logp
    loss, _ = topk_distillation_loss(SAMPLED, logp, log_weights(logp, posterior), rest="truncated", mask=mask)

    loss, _ = distillation_loss(EXACT, logits, posterior_logits.detach(), mask=mask)

    loss = -1 / (|z| n) sum_t sum_i w_t^i log pi(a_t^i),   w = min(posterior(a) / pi(a), 200), constant

The posterior is the same model's pass over the prompt with the reference answer appended; mask: of rationales that led
to the right answer. Without the bound, the expectation of the sampled gradient over a ~ pi is that of the exact loss,
D(posterior || pi), as pi - posterior shows (our observation; the paper samples).

Source: arXiv 2511.09865 (paper).
"""

import math

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_number, check_tensor
from ..errors import described, wrong
from ..logprobs.from_hidden import head_arguments
from ..logprobs.from_logits import DTYPES
from ..logprobs.row_chunks import check_count, ids_of_rows, rows_of
from ..objectives.distillation import distillation
from ..ops.linear.gemm import linear

SAMPLED = distillation("soft_ce", aggregation="seq-mean-token-mean")
EXACT = distillation("forward_kd", aggregation="seq-mean-token-mean")


@torch.no_grad()
def candidates(
    logits: Tensor,
    ids: Tensor,
    n: int = 5,
    *,
    row_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """int64 [.., n]: the rationale's own token and n - 1 drawn from softmax(logits), with replacement; -100 in rows
    that row_mask leaves out.

    Args:
        logits: bf16, fp16, fp32 or fp64 [N, V] or [B, T, V], divided by the temperature of the rollout.
        ids: int32 or int64 [..], the rationale's.
        n: from 1 to V.
        row_mask: bool [..].
        generator: of the draws.
        memory_budget: bytes held beyond the result, as for topk_ids.
    """
    check_tensor("logits", logits)
    if logits.dtype not in DTYPES or logits.dim() not in (2, 3):
        raise wrong("logits", described(logits), "bf16, fp16, fp32 or fp64 [N, V] or [B, T, V]")
    own = _own(ids, logits, n)
    return ids_of_rows(
        lambda at: _drawn(rows_of(logits, at), own[at], n, generator), logits, n, row_mask, memory_budget
    )


@torch.no_grad()
def linear_candidates(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    n: int = 5,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """candidates of the logits (hidden @ weight^T + bias) / temperature, of which only chunks of rows are held.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [V, D].
        ids: int32 or int64 [..], the rationale's.
        n: from 1 to V.
        bias: [V].
        temperature: of the rollout, above 0.
        row_mask: bool [..].
        generator: of the draws.
        memory_budget: bytes of the chunks, as for topk_ids.
    """
    head = head_arguments(hidden, weight, bias, temperature, None, 1.0, None, None, memory_budget, None)
    own = _own(ids, head.like, n)

    def drawn(at: Tensor) -> Tensor:
        return _drawn(linear(head.hidden[at], weight, bias) / temperature, own[at], n, generator)

    return ids_of_rows(drawn, head.like, n, row_mask, head.memory_budget)


def log_weights(logp: Tensor, posterior_logp: Tensor, *, ceiling: float = 200.0) -> Tensor:
    """log(min(posterior / pi, ceiling) / n), [.., n], of the dtype of logp: what stands for the teacher's log-probs in
    topk_distillation_loss(SAMPLED, ..., rest="truncated"). Without gradient: the posterior is the judge.

    Args:
        logp: fp32 or fp64 [.., n], of the candidates; no gradient passes.
        posterior_logp: of that shape, detached.
        ceiling: above 0, of posterior / pi.
    """
    check_number("ceiling", ceiling, above=0)
    check_floats("logp", logp)
    check_constant("posterior_logp", posterior_logp)
    if posterior_logp.shape != logp.shape:
        raise wrong("posterior_logp", f"shape {list(posterior_logp.shape)}", f"that of logp, {list(logp.shape)}")
    ratio = (posterior_logp - logp.detach()).clamp(max=math.log(ceiling))
    return (ratio - math.log(logp.shape[-1])).to(logp.dtype)


def _own(ids: Tensor, like: Tensor, n: int) -> Tensor:
    check_count("n", n, like.shape[-1])
    check_tensor("ids", ids)
    if ids.shape != like.shape[:-1] or ids.dtype not in (torch.int32, torch.int64):
        raise wrong("ids", f"{ids.dtype} {list(ids.shape)}", f"int32 or int64 {list(like.shape[:-1])}")
    return ids.reshape(-1, 1).long()


def _drawn(logits: Tensor, own: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    if n == 1:
        return own
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    drawn = torch.multinomial(wide.softmax(-1), n - 1, replacement=True, generator=generator)
    return torch.cat([own, drawn], -1)
