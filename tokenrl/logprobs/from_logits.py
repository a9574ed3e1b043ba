"""token_logprobs: what a trainer asks of the logits, in one pass over the vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch.checks import FP32, as_saved, check_name, check_positive, check_tensor, unit_stride, values_known
from ..errors import described, wrong
from ..observed import observed
from ..ops import backends, dispatch, kernel_ops
from ..ops.kernel_ops import IGNORED, Transform
from .token_stats import TokenStats
from .vocabulary import Vocabulary, refuse_beside_vocab

OUTPUTS = tuple(name for name in kernel_ops.RESULTS if name != "lse_rest")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@observed
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_mask_for: Sequence[str] | None = None,
    row_mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    outputs: Sequence[str] = ("logp", "entropy"),
    inplace_backward: bool = False,
    vocab: Vocabulary | None = None,
    check: bool = True,
    backend: str | None = None,
) -> TokenStats:
    """Statistics of softmax(z) per token, z = softcap tanh(logit_scale logits / softcap) / temperature.

        lse = log sum_v e^z_v                    d lse / d z_v = p_v
        logp = z_id - lse                        d logp / d z_v = 1[v = id] - p_v
        entropy = -sum_v p_v log p_v             d entropy / d z_v = -p_v (log p_v + entropy)
        log_sum_sq_probs = log sum_v p_v^2       d log_sum_sq_probs / d z_v = 2 (p_v^2 e^-log_sum_sq_probs - p_v)
        mean_logit = mean_v z_v                  no gradient, like the three below
        max_prob = max_v p_v
        is_top1 = id is the first maximum
        rank = 1 + #{v: logits_v > logits_id}

    Forward and backward allocate their results only; the backward recomputes p from lse. The bits of a row depend on
    nothing but the row: on a CPU always; on a GPU in batches of at least as many rows as it has multiprocessors, as
    fewer rows are split (and Triton sums rows whose distance 16 bytes do not divide by another kernel than the others).
    On a GPU an id outside [0, V) gives nan, is_top1 False, rank 0.

    Args:
        logits: [N, V] or [B, T, V], bf16, fp16, fp32 or fp64; strided views are read in place as long as the last
            stride is 1.
        ids: integers [N] or [B, T] in [0, V), already aligned with the logits (never shifted here), or K of them per
            row, [N, K] or [B, T, K]; then logp, is_top1 and rank are [..., K].
        temperature: a positive number, or one per row, fp32 or fp64 (0-d or [B, 1], too).
        softcap: positive, the model's; None for none.
        logit_scale: positive, the model's.
        keep_mask: bool [V] or like logits, False takes a logit out of the vocabulary as -inf does (p = 0, no gradient;
            mean_logit is the mean of what is kept); -inf logits stay out under a softcap.
        keep_mask_for: the outputs that see keep_mask, None for all; the others are of the whole vocabulary (slime's
            entropy beside top-p log-probs), and the logits are read once for either.
        row_mask: bool, [N] or [B, T]: a row that it leaves out gives zeros and is never read.
        ignore_index: an id of it gives 0 and no gradient; a row all of whose ids are ignored is never read.
        outputs: any of the eight names.
        inplace_backward: the gradient is written into the logits' memory; refused where autograd would notice.
        vocab: a tokenrl.distributed.VocabShard: logits and keep_mask are this rank's columns of a vocabulary that lies
            on several ranks, ids and results are of all of it, the same on each rank. One exchange of 3 + K numbers a
            row (two more for is_top1 or rank), none in the backward.
        check: that the ranks agree on shapes, ids and options, by an exchange of 256 bytes before it; where they do
            not, all of them raise.
        backend: as for policy_loss.

    Returns:
        TokenStats: fp32 (fp64 for fp64 logits), is_top1 bool, rank int64.
    """
    if vocab is not None:
        refuse_beside_vocab(vocab, keep_mask_for=keep_mask_for, inplace_backward=inplace_backward)
        return vocab.token_logprobs(
            logits, ids, temperature=temperature, softcap=softcap, logit_scale=logit_scale, keep_mask=keep_mask,
            row_mask=row_mask, ignore_index=ignore_index, outputs=outputs, backend=backend, check=check,
        )  # fmt: skip
    check_ids(logits, ids, outputs)
    chosen = backends.choose(backend, logits.device)
    if inplace_backward:
        _check_inplace(logits, chosen)
    transform = as_transform(temperature, softcap, logit_scale, keep_mask, logits)
    if transform.keep_mask is not None:
        transform = replace(transform, keep_mask=transform.keep_mask.expand(logits.shape))
    ids = aligned_ids(ids, row_mask, ignore_index, logits)
    parts = by_mask(outputs, transform, keep_mask_for)
    if inplace_backward and len(parts) > 1:
        raise wrong("inplace_backward", "True with outputs on both sides of keep_mask_for", "False")
    found: dict[str, Tensor] = {}
    for part, names in parts:
        results = dispatch.token_logprobs(
            chosen,
            unit_stride(logits),
            ids,
            *of_rows_read(part, ids, ids.dim() == logits.dim()),
            [name for name in names if name not in kernel_ops.ALWAYS],
            inplace_backward,
        )
        found |= {name: results[kernel_ops.RESULTS.index(name)] for name in names}
    return TokenStats({name: found[name] for name in outputs})


def by_mask(
    outputs: Sequence[str], transform: Transform, keep_mask_for: Sequence[str] | None
) -> list[tuple[Transform, list[str]]]:
    """The outputs of each transform: with its keep_mask, and where some do not see that, without it."""
    if keep_mask_for is None:
        return [(transform, list(outputs))]
    if transform.keep_mask is None or isinstance(keep_mask_for, str) or not {*keep_mask_for} <= {*outputs}:
        accepted = f"some of outputs, {', '.join(outputs)}, beside a keep_mask"
        raise wrong("keep_mask_for", described(keep_mask_for), accepted)
    sides = {True: transform, False: replace(transform, keep_mask=None)}
    parts = [(side, [name for name in outputs if (name in keep_mask_for) is sees]) for sees, side in sides.items()]
    return [part for part in parts if part[1]]


def as_transform(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, keep_mask: Tensor | None, logits: Tensor
) -> Transform:
    """Checked; temperatures of the shape of the rows, keep_mask [V] or of the shape of logits."""
    for name, value in (("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None:
            check_positive(name, value)
    number, per_row = _temperature(temperature, logits)
    if keep_mask is not None:
        _check_keep(keep_mask, logits)
        keep_mask = as_saved(unit_stride(keep_mask))
    cap = float("inf") if softcap is None else float(softcap)
    return Transform(number, per_row, cap, float(logit_scale), keep_mask)


def aligned_ids(ids: Tensor, row_mask: Tensor | None, ignore_index: int, logits: Tensor) -> Tensor:
    """int64, -100 where ignored; checked against the vocabulary where that costs no sync."""
    if not isinstance(ignore_index, int):
        raise wrong("ignore_index", described(ignore_index), f"an integer ({IGNORED} where no id is ignored)")
    given = ids = ids if ids.dtype == torch.int64 else ids.to(torch.int64)
    if ignore_index != IGNORED:  # then IGNORED is an id out of range like any other
        ids = torch.where(ids == ignore_index, IGNORED, torch.where(ids == IGNORED, -1, ids))
    if row_mask is not None:
        check_row_mask(row_mask, logits)
        ids = torch.where(row_mask.view(*row_mask.shape, *(1,) * (ids.dim() - row_mask.dim())), ids, IGNORED)
    if ids.numel() and values_known(ids):
        _check_range(ids, given, logits.shape[-1], ignore_index)
    return as_saved(ids.contiguous())


def check_row_mask(row_mask: Tensor, logits: Tensor) -> None:
    check_tensor("row_mask", row_mask)
    if row_mask.shape != logits.shape[:-1] or row_mask.dtype != torch.bool:
        given = f"{row_mask.dtype} {list(row_mask.shape)}"
        raise wrong("row_mask", given, f"bool, one per row of logits, {list(logits.shape[:-1])}")
    if row_mask.device != logits.device:
        raise wrong("row_mask", f"device {row_mask.device}", f"the device of logits, {logits.device}")


def _check_range(ids: Tensor, given: Tensor, vocab: int, ignore_index: int) -> None:
    low, high = ids.aminmax()  # where nothing is ignored one pass says it all
    if low < 0 or high >= vocab:
        if ((ids != IGNORED) & ((ids < 0) | (ids >= vocab))).any():
            low, high = given.aminmax()
            accepted = f"0 to {vocab - 1}, or {ignore_index} to ignore a row"
            raise wrong("ids", f"values from {low} to {high}", accepted)


def of_rows_read(transform: Transform, ids: Tensor, several: bool) -> Transform:
    """With a temperature of 1 in the rows that are never read, whatever it was there. several: ids has K a row."""
    if transform.temperatures is None:
        return transform
    read = ids != IGNORED
    read = read.any(-1) if several else read
    temperatures = torch.where(read.view(transform.temperatures.shape), transform.temperatures, 1)
    if values_known(temperatures):
        good = (temperatures >= FP32.tiny) & (temperatures <= FP32.max)
        if not good.all():
            bad = temperatures[~good][0].item()
            raise wrong("temperature", f"{bad} in the tensor", "positive finite numbers in the range of fp32")
    return replace(transform, temperatures=temperatures)


def _temperature(temperature: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """(number, None), or (1, one per row) in the precision of the results."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        if torch.compiler.is_compiling() and temperature != 1:  # an op's number is burnt into a graph, a factor not
            dtype = torch.promote_types(logits.dtype, torch.float32)
            return 1.0, logits.new_ones(logits.shape[:-1], dtype=dtype) * temperature
        return float(temperature), None
    check_tensor("temperature", temperature)
    if temperature.dim() == 0 or temperature.shape == (*logits.shape[:-2], 1):
        temperature = temperature.expand(logits.shape[:-1])
    if temperature.shape != logits.shape[:-1] or temperature.dtype not in (torch.float32, torch.float64):
        accepted = f"a positive number, or fp32 or fp64, one per row of logits, {list(logits.shape[:-1])}"
        raise wrong("temperature", f"{temperature.dtype} {list(temperature.shape)}", accepted)
    if temperature.requires_grad:
        raise wrong("temperature", "a tensor that requires grad", "one without: no gradient flows to it")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return 1.0, as_saved(temperature.detach().to(logits.device, dtype).contiguous())


def check_ids(logits: Tensor, ids: Tensor, outputs: Sequence[str]) -> None:
    check_tensor("logits", logits)
    check_tensor("ids", ids)
    if logits.dtype not in DTYPES:
        raise wrong("logits", f"dtype {logits.dtype}", ", ".join(map(str, DTYPES)))
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise wrong("logits", f"shape {list(logits.shape)}", "[N, V] or [B, T, V] with V >= 1")
    rows = logits.shape[:-1]
    if ids.shape != rows and (ids.dim() != logits.dim() or ids.shape[:-1] != rows or ids.shape[-1] == 0):
        accepted = f"one id per row of logits, {list(rows)}, or K of them, {[*rows, 'K']}"
        raise wrong("ids", f"shape {list(ids.shape)}", accepted)
    if ids.dtype not in (torch.int64, torch.int32):
        raise wrong("ids", f"dtype {ids.dtype}", "int64 or int32")
    if ids.device != logits.device:
        raise wrong("ids", f"device {ids.device}", f"the device of logits, {logits.device}")
    if isinstance(outputs, str) or not isinstance(outputs, (list, tuple, Sequence)):
        raise wrong("outputs", described(outputs), "a list of names, as ['logp', 'entropy']")
    for name in outputs:
        check_name("outputs", name, OUTPUTS)
    if len(set(outputs)) != len(outputs):
        raise wrong("outputs", f"{list(outputs)}", "every name once")


def _check_keep(keep_mask: Tensor, logits: Tensor) -> None:
    check_tensor("keep_mask", keep_mask)
    if keep_mask.dtype != torch.bool or keep_mask.shape not in (logits.shape, logits.shape[-1:]):
        accepted = f"bool [{logits.shape[-1]}] or {list(logits.shape)}"
        raise wrong("keep_mask", f"{keep_mask.dtype} {list(keep_mask.shape)}", accepted)
    if keep_mask.device != logits.device:
        raise wrong("keep_mask", f"device {keep_mask.device}", f"the device of logits, {logits.device}")


def _check_inplace(logits: Tensor, chosen: backends.Backend) -> None:
    if reason := why_not_inplace(logits, chosen):
        raise wrong("inplace_backward", f"True, but {reason}", "False here")


def why_not_inplace(logits: Tensor, chosen: backends.Backend) -> str | None:
    """Why a gradient in the logits' memory would be noticed by autograd or miss that memory; None where it may go."""
    owner = logits if logits._base is None else logits._base
    if chosen.is_reference:
        return "the reference backend leaves its backward to autograd"
    if torch.compiler.is_compiling():
        return "a traced graph may not write to what it saved"
    if logits.requires_grad and owner.is_leaf:
        return "logits is a leaf or a view of one, whose values would be lost: pass the output of an operation"
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        return "logits is expanded: several of its elements share memory"
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return "the last stride of logits is not 1, so the kernel reads a copy"
    for node in (logits.grad_fn, owner.grad_fn):
        # Asked of the type: a look at what a node saved would run a checkpointed forward again.
        if hasattr(type(node), "_saved_result") or hasattr(type(node), "_saved_output"):
            return f"{type(node).__name__}, which made the logits, needs them for its own backward"
    return None


def made_by_torch(logits: Tensor) -> bool:
    """Whether torch's own operations made them, of which why_not_inplace knows what they save: a Function written in
    Python, a compiled graph among them, may keep its output where nobody sees it, and a write through a view hides
    whose output it wrote."""
    owner = logits if logits._base is None else logits._base
    nodes = (type(made.grad_fn) for made in (logits, owner) if made.grad_fn is not None)
    named = {node.__name__: node for node in nodes}
    return "CopySlices" not in named and all(vars(torch._C._functions).get(n) is node for n, node in named.items())
