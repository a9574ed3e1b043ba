"""token_divergence: how far a model's distribution over the vocabulary is from another one's, per token."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_tensor, made_in_inference_mode, unit_stride
from ..errors import described, renamed, wrong
from ..objectives.divergences import Divergence, divergence
from ..observed import observed
from ..ops import backends
from ..ops import divergence_dispatch as pairs
from ..ops.kernel_ops import IGNORED, Transform
from ..ops.linear.head import HeadInputs
from .from_hidden import head_arguments
from .from_logits import DTYPES, as_transform, check_row_mask, of_rows_read
from .token_stats import TokenStats
from .vocabulary import Vocabulary, agreement, refuse_beside_vocab

Kinds = str | Divergence | Sequence[str | Divergence]


@observed
def token_divergence(
    logits: Tensor,
    other_logits: Tensor,
    kind: Kinds = "forward_kl",
    *,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    other_logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    other_keep_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    vocab: Vocabulary | None = None,
    check: bool = True,
    backend: str | None = None,
) -> Tensor | TokenStats:
    """Divergences of p = softmax(z) from r = softmax(z'), z and z' the transformed logits, as in token_logprobs.

        D = sum_v f(log p_v, log r_v)        d D / d z_v = p_v df/dp_v - p_v sum_k p_k df/dp_k, likewise for z'

    The forward keeps six numbers per row. It reads the logits of both once for "forward_kl", "reverse_kl" and
    "cross_entropy", and twice for any other kind, of which the first of several finds what the rest need; the backward
    reads both once and writes one. Differentiating twice raises.

    Args:
        logits: bf16, fp16, fp32 or fp64 [N, V] or [B, T, V]. Logits of -inf are out of the distribution: 0 log 0 = 0, a
            divergence is infinite where the formula is, and they get no gradient.
        other_logits: of the same shape and dtype. Both get gradients where they require them: a frozen teacher's do
            not. logits, or logits.detach(), with an other_temperature is the KL to its own tempered self.
        kind: a name of tokenrl.DIVERGENCES ("forward_kl" D(r || p), "reverse_kl" D(p || r), "jsd", "total_variation",
            ...), what tokenrl.divergence(name, ...) returns, or several of both.
        temperature: as for token_logprobs.
        other_temperature: that of the other head; None: the temperature.
        softcap: as for token_logprobs.
        other_softcap: that of the other head.
        logit_scale: as for token_logprobs.
        other_logit_scale: that of the other head.
        keep_mask: as for token_logprobs.
        other_keep_mask: that of the other head.
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and are never read.
        vocab: a tokenrl.distributed.VocabShard: logits, other_logits and both keep_masks are this rank's columns of a
            vocabulary that lies on several ranks, the divergences those of all of it, the same on each rank. One
            exchange of 5 numbers a row for "forward_kl", "reverse_kl" and "cross_entropy", two, of 4 and 3, for any
            other kind; none in the backward.
        check: as for token_logprobs.
        backend: as for policy_loss.

    Returns:
        The divergence, [N] or [B, T], fp32 (fp64 of fp64 logits); of several kinds an object with an attribute for each
            by its name, which iterates in their order.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.

    Source: see tokenrl.DIVERGENCES.
    """
    kinds, pair = _kinds(kind), (logits, other_logits)
    other_temperature = temperature if other_temperature is None else other_temperature
    own = temperature, softcap, logit_scale, keep_mask
    other = other_temperature, other_softcap, other_logit_scale, other_keep_mask
    if vocab is not None:
        refuse_beside_vocab(vocab)
        found = vocab.token_divergences(kinds, pair, (own, other), row_mask, backend, check)
    else:
        logits, other_logits, rows, transforms = checked_pair(*pair, (own, other), row_mask)
        chosen = backends.choose(backend, logits.device)
        found = pairs.divergences(chosen, unit_stride(logits), unit_stride(other_logits), rows, *transforms, kinds)
    values = {kind.name: value for kind, value in zip(kinds, found, strict=True)}
    return values[kinds[0].name] if isinstance(kind, str | Divergence) else TokenStats(values)


def checked_pair(
    logits: Tensor, other_logits: Tensor, options: Sequence[tuple[Any, ...]], row_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Transform, Transform]]:
    """(both logits, which rows count, the transforms of both). options: temperature, softcap, logit_scale, keep_mask of
    either."""
    for name, x in (("logits", logits), ("other_logits", other_logits)):
        check_tensor(name, x)
    _check_pair(logits, other_logits)
    own, other = options
    of: Callable[..., Transform] = as_transform
    how = of(*own, logits), renamed("other", of, *other, other_logits)
    if row_mask is not None:
        check_row_mask(row_mask, logits)
    rows = None if row_mask is None else as_saved(row_mask.contiguous())
    ids = logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
    ids = ids if rows is None else ids.masked_fill(~rows, IGNORED)
    first, second = (_expanded(of_rows_read(one, ids, False), logits) for one in how)
    return logits, other_logits, rows, (first, second)


def _kinds(kind: Kinds) -> list[Divergence]:
    if isinstance(kind, str) or not isinstance(kind, Sequence):
        return [divergence(kind)]
    kinds = [divergence(one) for one in kind]
    names = [one.name for one in kinds]
    if not kinds or len({*names}) < len(names):
        raise wrong("kind", names, "at least one, each once")
    return kinds


def _check_pair(logits: Tensor, other: Tensor) -> None:
    if logits.dtype not in DTYPES or logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise wrong("logits", described(logits), "bf16, fp16, fp32 or fp64 [N, V] or [B, T, V], V > 0")
    if other.shape != logits.shape or other.dtype != logits.dtype or other.device != logits.device:
        accepted = f"those of logits, {logits.dtype} {list(logits.shape)} on {logits.device}"
        raise wrong("other_logits", f"{other.dtype} {list(other.shape)} on {other.device}", accepted)
    if torch.is_grad_enabled() and logits.requires_grad and made_in_inference_mode(other):  # too large for a copy
        accepted = "one that autograd may save (made under torch.no_grad, or other_logits.clone())"
        raise wrong("other_logits", "a tensor made in inference mode", accepted)


def _expanded(transform: Transform, logits: Tensor) -> Transform:
    if transform.keep_mask is None:
        return transform
    return replace(transform, keep_mask=transform.keep_mask.expand(logits.shape))


@observed
def linear_token_divergence(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    kind: str | Divergence = "forward_kl",
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    other_logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    other_keep_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    vocab: Vocabulary | None = None,
    reduce_hidden_grad: bool = True,
    check: bool = True,
    backend: str | None = None,
) -> Tensor:
    """token_divergence of the logits hidden @ weight^T + bias and other_hidden @ other_weight^T + other_bias, of which
    only chunks of whole rows are held.

    The backward makes the logits anew, 8 N D V and 4 N D' V flops in all; linear_distillation_loss, which knows the
    weight of each token, needs 6 and 2. Of the same weight and bias (other_weight=weight) a chunk's logits of both are
    one GEMM. Gradients go to hidden, weight and bias, each where it requires one.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [V, D].
        other_hidden: [N, D'] or [B, T, D'], of the other head, which is frozen: a tensor of it that requires grad
            raises.
        other_weight: [V, D'].
        kind: as for token_divergence, one alone.
        bias: [V].
        other_bias: [V].
        temperature: as for token_divergence, and so are all up to keep_mask.
        other_temperature: None: the temperature.
        softcap: None for none.
        other_softcap: likewise.
        logit_scale: a number.
        other_logit_scale: likewise.
        keep_mask: bool [V], or of each row.
        other_keep_mask: likewise.
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and enter no GEMM.
        compute_dtype: of the GEMMs of both heads, as for linear_token_logprobs.
        memory_budget: bytes of the chunks, as for linear_token_logprobs; a row of both heads' logits and one's gradient
            must fit.
        vocab: a tokenrl.distributed.VocabShard: weight, bias, keep_mask and those of the other head are this rank's
            rows, both hidden states the same on all ranks, unless the VocabShard says sequence_parallel, and so are the
            divergences. The exchanges of token_divergence, a chunk; the backward, which makes the logits anew, has them
            too, and sums the ranks' shares of hidden's gradient.
        reduce_hidden_grad: False leaves that sum to the caller.
        check: as for token_logprobs.
        backend: as for policy_loss.
    """
    with agreement(vocab, "linear_token_divergence", hidden, check) as agreed:
        row, heads = divergence(kind), head_pair(
            (hidden, weight, bias, temperature, softcap, logit_scale, keep_mask),
            (other_hidden, other_weight, other_bias, temperature if other_temperature is None else other_temperature,
             other_softcap, other_logit_scale, other_keep_mask),
            row_mask, compute_dtype, memory_budget, vocab,
        )  # fmt: skip
        chosen = backends.choose(backend, hidden.device)
        if vocab is not None:
            vocab.agree_on_divergence(agreed, *heads, row, False)
    _, value = of_head_pair(vocab, hidden, reduce_hidden_grad, chosen, *heads, row, None)
    return value.view(rows_of(vocab, hidden))


def of_head_pair(
    vocab: Vocabulary | None, hidden: Tensor, reduce_hidden_grad: bool, chosen: backends.Backend, *call: Any
) -> tuple[Tensor, ...]:
    """(loss, divergences [N]) of what divergence_dispatch.linear_divergence takes, of one process or on ranks."""
    if vocab is not None:
        return vocab.linear_divergence(hidden, reduce_hidden_grad, chosen, *call)
    return pairs.linear_divergence(chosen, *call)


def rows_of(vocab: Vocabulary | None, hidden: Tensor) -> tuple[int, ...]:
    """[N] or [B, T], of all tokens, where hidden is of some."""
    return tuple(hidden.shape[:-1]) if vocab is None else vocab.rows_of(hidden)


def head_pair(
    own: tuple[Any, ...], other: tuple[Any, ...], row_mask: Tensor | None, compute_dtype: torch.dtype | None,
    memory_budget: int | None, vocab: Vocabulary | None = None,
) -> tuple[HeadInputs, HeadInputs]:  # fmt: skip
    """Both heads, checked and flat; each is (hidden, weight, bias, temperature, softcap, logit_scale, keep_mask)."""
    how = (compute_dtype, memory_budget, None)
    of: Callable[..., Any] = head_arguments if vocab is None else vocab.head_arguments
    heads = [of(*own, *how), renamed("other", of, *other, *how)]
    for name, x in zip(("other_hidden", "other_weight", "other_bias"), other[:3], strict=True):
        if x is not None and x.requires_grad:
            raise wrong(name, "a tensor that requires grad", f"a frozen head ({name}.detach()); logits get gradients")
    shapes = [list(head.like.shape) for head in heads]
    if shapes[0] != shapes[1]:
        raise wrong("other_hidden", f"a head of logits {shapes[1]}", f"those of the trained one, {shapes[0]}")
    if heads[0].compute_dtype != heads[1].compute_dtype:
        dtypes = " and ".join(head.compute_dtype for head in heads)
        raise wrong("compute_dtype", f"None of heads in {dtypes}", "one of these")
    ids = heads[0].like.new_zeros(shapes[0][:-1], dtype=torch.int64)
    return heads[0].inputs(ids, row_mask, IGNORED), heads[1].inputs(ids, row_mask, IGNORED)
