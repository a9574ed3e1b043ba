"""linear_policy_loss: loss and gradients from hidden states in one pass over chunks of tokens.

A chunk's logits give its log-probs, these the objective's coefficients, these the gradient of its logits in their own
place, and that its share of the gradients of hidden and weight: 6 N D V flops, where recomputing the logits takes 8.
That needs a coefficient to depend on no later chunk. Statistics of a token or a prefix with flow "local" never do;
for the others chunks end where sequences do. Where a sequence does not fit into a chunk, or hardly any row into the
budget, two passes over tiles do the same (tokenrl/tiles.py).

The scan is carried from chunk to chunk by the log-probs: the objective's kernel walks the tokens up to the end of each
chunk anew, which costs it nanoseconds per token, where the chunk's GEMMs take microseconds per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tiles
from .contract import IGNORED
from .head import Head, Rows, as_tile, compacted, fitting_whole_rows, rows_at, split
from .products import ProductSum, add_product, column_sums, sum_dtype
from .tiles import Gradients

FEWEST_TOKENS = 64  # of a chunk: below, the sums of the weight's gradient would cost more than a second pass
WORTH_MOVING = 7 / 8  # tokens with a gradient, of a chunk: at most so many are moved together before its GEMMs


@dataclass(frozen=True)
class Terms:
    """What the loss is made of, beside log-probs and entropies. Tokens are flat [N]; old_logp None: on-policy.

    loss = sum_t w_t (gate(s_t) + kl_coef kl_t - entropy_coef entropy_t)
    """

    ops: object
    old_logp: Tensor | None
    advantages: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor
    starts: Tensor | None
    span_weight: Tensor
    normalizer: Tensor
    token_weight: Tensor | None
    weights: Tensor
    statistic: str
    flow: str
    gate: str
    params: list[float]
    param_tensors: list[Tensor | None]
    clamp: float
    cap: float
    ref_logp: Tensor | None
    kl_gate: str
    kl_params: list[float]
    kl_clamp: float
    kl_cap: float
    kl_coef: float
    entropy_coef: float

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's coefficient may depend on the log-probs of later tokens of its sequence."""
        local = self.statistic == "token" or (self.statistic.startswith("prefix") and self.flow == "local")
        return not local and self.old_logp is not None

    def evaluate(self, logp: Tensor, entropy: Tensor, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(loss, metrics, its gradients by logp and by entropy) of the tokens before `end`."""

        def until(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:end]

        spans = (until(self.mask), self.cu_seqlens.clamp(max=end), until(self.starts), self.span_weight)
        spans = (*spans, self.normalizer, until(self.token_weight))
        old_logp = logp if self.old_logp is None else self.old_logp
        loss, coef, metrics = self.ops.objective(
            until(logp), until(old_logp), until(self.advantages), *spans, self.statistic, self.flow, self.gate,
            self.params, [until(p) for p in self.param_tensors], self.clamp, self.cap,
        )  # fmt: skip
        kl, grad_entropy = loss.new_zeros(()), None
        if self.ref_logp is not None:
            kl, kl_coef, _ = self.ops.objective(
                until(logp), until(self.ref_logp), None, *spans, "token", "through", self.kl_gate, self.kl_params,
                [None] * len(self.kl_params), self.kl_clamp, self.kl_cap,
            )  # fmt: skip
            loss, coef = loss + self.kl_coef * kl, coef + self.kl_coef * kl_coef
        weights = until(self.weights)
        bonus = torch.where(weights != 0, weights * until(entropy), 0).sum()
        if self.entropy_coef != 0:
            loss, grad_entropy = loss - self.entropy_coef * bonus, -self.entropy_coef * weights
        return loss, torch.cat([metrics, torch.stack([kl, bonus])]), coef, grad_entropy


class Chunk:
    """Some tokens' logits in `memory`, their log-probs [n] and entropies [n], and then their gradients."""

    def __init__(self, head: Head, hidden: Tensor, ids: Tensor, rows: Rows, memory: Tensor):
        self.head, self.rows, self.ids = head, rows, ids[rows]
        self.states = hidden[rows].to(head.dtype)
        self.logits = as_tile(memory, self.states.shape[0], slice(0, head.vocab))
        head.whole_logits(self.states, self.logits)
        stats = head.ops.token_logprobs(self.logits[None], self.ids[None], *self._transform(), [], False)
        logp, self.entropy, self.lse, self.lse_rest, *_ = (x.squeeze(0) for x in stats)
        self.logp = logp.squeeze(1)

    def _transform(self) -> tuple:
        return self.head.transform(self.rows, self.states.shape[0], slice(0, self.head.vocab))

    def backward(self, coef: Tensor, grad_entropy: Tensor | None, weights: ProductSum | None, grads: Gradients) -> None:
        """coef, grad_entropy: of all tokens."""
        upstream = [None if g is None else g[self.rows] for g in (coef, grad_entropy)]
        index, count = compacted(torch.stack([g != 0 for g in upstream if g is not None]).any(0))
        if count <= WORTH_MOVING * self.logp.numel():
            upstream = [None if g is None else g[index] for g in upstream]
            self._keep(index)
        coef, grad_entropy = upstream
        self.head.ops.token_logprobs_backward_(
            coef[None, :, None], None if grad_entropy is None else grad_entropy[None], None, None, self.logits[None],
            self.ids[None], self.lse[None], self.lse_rest[None], self.entropy[None], self.lse.new_empty(0),
            *self._transform(),
        )  # fmt: skip
        if grads.hidden is not None:
            grads.hidden[self.rows] = self._hidden_gradient().to(grads.hidden.dtype)
        if weights is not None:
            weights.add(self.logits.t(), self.states)
        if grads.bias is not None:
            grads.bias.add_(column_sums(self.logits))

    def _keep(self, index: Tensor) -> None:
        """Leaves out the other tokens; logits move up in their own memory, in order, an eighth at a time."""
        self.rows = index + self.rows.start if isinstance(self.rows, slice) else self.rows[index]
        for to in split(index.numel(), -(-self.logits.shape[0] // 8)):
            self.logits[to] = self.logits[index[to]]
        self.logits = self.logits[: index.numel()]
        self.states, self.ids, self.entropy = self.states[index], self.ids[index], self.entropy[index]
        self.lse, self.lse_rest = self.lse[index], self.lse_rest[index]

    def _hidden_gradient(self) -> Tensor:
        if not self.head.cast_columns:
            return torch.mm(self.logits, self.head.weight)
        total = self.states.new_zeros(self.states.shape, dtype=sum_dtype(self.head.dtype))
        for at in self.head.pieces():
            add_product(total, self.logits[:, at], self.head.columns(at))
        return total


def run(terms: Terms, head: Head, hidden: Tensor, ids: Tensor, budget: int, grads: Gradients) -> tuple[Tensor, Tensor]:
    """(loss, metrics [9 of the objective, KL, entropy, passes]); fills grads. ids [N, 1]; tokens that the mask leaves
    out enter no GEMM."""
    wanted = any(g is not None for g in (grads.hidden, grads.weight, grads.bias))
    index, count = compacted(terms.mask)
    chunks = _chunks(terms, head, count, budget, _sum_bytes(grads.weight, head.dtype)) if wanted else None
    if chunks is not None:
        logp, entropy = _one_pass(terms, head, hidden, ids, index, chunks, grads)
    else:
        logp, entropy = _two_passes(terms, head, hidden, ids, budget, grads if wanted else None)
    loss, metrics, *_ = terms.evaluate(logp, entropy, ids.shape[0])
    passes = 2 if wanted and chunks is None else 1
    return loss, torch.cat([metrics, metrics.new_full((1,), passes)])


def _sum_bytes(grad_weight: Tensor | None, dtype: torch.dtype) -> int:
    """What several chunks take for the sum of their weight gradients, and one chunk does not."""
    if grad_weight is None or grad_weight.dtype != dtype or dtype == sum_dtype(dtype):
        return 0
    return grad_weight.numel() * sum_dtype(dtype).itemsize


def _chunks(terms: Terms, head: Head, count: int, budget: int, sum_bytes: int) -> list[slice] | None:
    """Parts of the active tokens, cut where the objective allows it; None if too few tokens fit into one."""
    # One chunk needs no sum: its logits may take that memory.
    if count <= fitting_whole_rows(head, budget + sum_bytes):
        return list(split(count, count))
    fit = fitting_whole_rows(head, budget)
    if fit < min(count, FEWEST_TOKENS):
        return None
    if not terms.looks_ahead:
        return list(split(count, -(-count // -(-count // fit))))
    active = torch.cat([terms.cu_seqlens.new_zeros(1), terms.mask.cumsum(0)])
    begin, last, chunks = 0, 0, []
    for end in active[terms.cu_seqlens[1:]].tolist():
        if end - last > fit:
            return None
        if end - begin > fit:
            chunks.append(slice(begin, last))
            begin = last
        last = end
    return [*chunks, slice(begin, count)]


def _one_pass(
    terms: Terms, head: Head, hidden: Tensor, ids: Tensor, index: Tensor | None, chunks: list[slice], grads: Gradients
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all tokens, and the gradients, chunk by chunk."""
    logp, entropy = (hidden.new_zeros(ids.shape[0], dtype=sum_dtype(head.dtype)) for _ in range(2))
    lasts = [chunk.stop - 1 for chunk in chunks]
    if index is not None:
        lasts = index[lasts].tolist()
    longest = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    memory = hidden.new_empty(longest * head.vocab, dtype=head.dtype)
    weights = None
    if grads.weight is not None:
        weights = ProductSum(grads.weight, head.dtype, once=len(chunks) == 1, adds=grads.adds)
    for at, last in zip(chunks, lasts, strict=True):
        chunk = Chunk(head, hidden, ids, rows_at(index, at), memory)
        logp[chunk.rows], entropy[chunk.rows] = chunk.logp, chunk.entropy
        # On-policy every log ratio is 0, the later ones too.
        _, _, *upstream = terms.evaluate(logp, entropy, ids.shape[0] if terms.old_logp is None else last + 1)
        chunk.backward(*upstream, weights, grads)
    if weights is not None:
        weights.finish()
    return logp, entropy


def _two_passes(
    terms: Terms, head: Head, hidden: Tensor, ids: Tensor, budget: int, grads: Gradients | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of all tokens, then the gradients, if any, from logits computed again."""
    active = torch.where(terms.mask[:, None], ids, IGNORED)
    logp, entropy, lse, lse_rest, squares, *_ = tiles.statistics(head, hidden, active, [], budget)
    logp = logp.squeeze(1)
    if grads is not None:
        _, _, coef, grad_entropy = terms.evaluate(logp, entropy, ids.shape[0])
        upstream, saved = (coef[:, None], grad_entropy, None, None), (lse, lse_rest, entropy, squares)
        tiles.gradients(head, upstream, hidden, active, saved, budget, grads)
    return logp, entropy
