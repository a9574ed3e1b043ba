"""linear_token_logprobs: the statistics of token_logprobs from hidden states, without the logits."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_bytes, check_tensor, made_in_inference_mode
from ..errors import wrong
from ..observed import observed
from ..ops import backends, dispatch, kernel_ops
from ..ops.kernel_ops import Transform
from ..ops.linear.head import HeadInputs
from . import from_logits
from .from_logits import DTYPES, IGNORED
from .token_stats import TokenStats
from .vocabulary import Vocabulary, refuse_beside_vocab

# Bytes of tiles and chunks of logits, where a call names no budget: a GPU's GEMMs and sums want larger ones.
DEFAULT_BUDGET = {"cpu": 256 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class HeadArguments:
    """The arguments that describe a head, checked, as the ops of tokenrl/ops/linear_ops.py take them.

    like: stands for the logits [.., V] that never exist: their shape, dtype and device on one number."""

    like: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: Transform
    compute_dtype: str
    memory_budget: int
    main_grad: Tensor | None

    def inputs(self, ids: Tensor, row_mask: Tensor | None, ignore_index: int) -> HeadInputs:
        """With ids and hidden flat, [N, K] and [N, D]."""
        ids = from_logits.aligned_ids(ids, row_mask, ignore_index, self.like)
        ids = ids.flatten(0, -2) if ids.dim() == self.like.dim() else ids.reshape(-1, 1)
        tensors = (self.hidden, self.weight, self.bias, ids)
        transform = from_logits.of_rows_read(self.transform, ids, several=True)
        return HeadInputs(*(*tensors, *transform, self.compute_dtype, self.memory_budget))


def head_arguments(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None,
    logit_scale: float, keep_mask: Tensor | None, compute_dtype: torch.dtype | None, memory_budget: int | None,
    main_grad: Tensor | None,
) -> HeadArguments:  # fmt: skip
    _check_head(hidden, weight, bias, compute_dtype, main_grad)
    dtype = compute_dtype or hidden.dtype
    if compute_dtype is None and (followed := head_dtype(hidden)) != dtype:
        _warn_of_autocast(followed, dtype)
    if memory_budget is None:
        memory_budget = DEFAULT_BUDGET.get(hidden.device.type, DEFAULT_BUDGET["cpu"])
    check_bytes("memory_budget", memory_budget)
    like = hidden.new_empty((), dtype=dtype).expand(*hidden.shape[:-1], weight.shape[0])
    transform = from_logits.as_transform(temperature, softcap, logit_scale, keep_mask, like)
    if transform.temperatures is not None:
        transform = replace(transform, temperatures=transform.temperatures.reshape(-1))
    if transform.keep_mask is not None:
        transform = replace(transform, keep_mask=transform.keep_mask.reshape(-1, like.shape[-1]))
    return HeadArguments(
        like, as_saved(hidden).reshape(-1, hidden.shape[-1]), weight, bias, transform,
        str(dtype).removeprefix("torch."), memory_budget, main_grad,
    )  # fmt: skip


def head_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of a model's own GEMM: autocast's, which leaves fp64 alone, else that of hidden."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _warn_of_autocast(autocast: torch.dtype, dtype: torch.dtype) -> None:
    """A head of the model's own would compute in the dtype of autocast."""
    if not torch.compiler.is_compiling():
        text = f"compute_dtype: got None under autocast to {autocast}, which is not followed; computes in {dtype}"
        warnings.warn(f"{text} (name either of them)", stacklevel=4)


@observed
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    keep_mask_for: Sequence[str] | None = None,
    row_mask: Tensor | None = None,
    ignore_index: int = IGNORED,
    outputs: Sequence[str] = ("logp", "entropy"),
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    main_grad: Tensor | None = None,
    vocab: Vocabulary | None = None,
    reduce_hidden_grad: bool = True,
    check: bool = True,
    backend: str | None = None,
) -> TokenStats:
    """token_logprobs of the logits hidden @ weight^T + bias, of which no more is held than fits into memory_budget.

    Rows that are ignored or masked, and in the backward rows whose upstream gradient is zero, enter no GEMM and may
    hold anything. hidden, weight and bias get gradients, each only where it requires one. The forward saves what
    token_logprobs saves. Where the logits of all N rows take 7/8 of memory_budget at most, with hidden and the sums of
    its gradient, it keeps them too, until the graph is gone: 6 N D V flops in all. Else, where keep_mask_for splits the
    outputs and under no_grad it keeps none, and the backward computes them again, a tile at a time: 8 N D V. No
    log-prob has other bits for it; gradients differ by the rounding of the GEMMs. Several calls before a backward keep
    the logits of each: a memory_budget below them keeps none. Gradients are summed in fp32 (fp64 for fp64) and rounded
    to the dtype of their tensor at the end. Autocast is not followed, and a warning says so: compute_dtype tells.

    Of whole rows our kernels give each row the bits of token_logprobs, whatever else the batch and outputs hold, and
    linear_policy_loss the same: its on-policy ratios are 1. The logits themselves are torch's GEMM, which promises no
    bits: on the CPUs we tried a row's depend on no other from 16 rows on, cuBLAS chooses its kernels by the shapes.

    Args:
        hidden: [N, D] or [B, T, D], bf16, fp16, fp32 or fp64.
        weight: the head's, [V, D], of hidden's dtype, or of any beside compute_dtype.
        ids: as for token_logprobs.
        bias: [V], of weight's dtype.
        temperature: as for token_logprobs.
        softcap: as for token_logprobs.
        logit_scale: as for token_logprobs.
        keep_mask: as for token_logprobs; padding of the vocabulary.
        keep_mask_for: as for token_logprobs; where it splits the outputs the flops are those of two calls.
        row_mask: as for token_logprobs.
        ignore_index: as for token_logprobs.
        outputs: as for token_logprobs.
        compute_dtype: the dtype in which the GEMMs run and the logits are stored (torch.float32: an fp32 head); None:
            that of hidden and weight.
        memory_budget: bytes that a forward or a backward may hold beyond inputs and results, kept logits among them;
            None: 256 MiB on a CPU, 1 GiB on a GPU. Where the fp32 sums of hidden's gradient take more than half of it
            they come on top. Tiles are of whole rows if 64 of these (or all there are) fit, as for is_top1 and rank
            they must; else of some columns.
        main_grad: fp32 [V, D] (fp64 for fp64): the backward adds the weight's gradient to it, and weight.grad gets
            none; where weight has Megatron's grad_added_to_main_grad, that becomes True and weight.grad is memory
            without meaning.
        vocab: as for token_logprobs: weight, bias, keep_mask and main_grad are this rank's rows of the head, hidden and
            ids are the same on all ranks. The exchange is one of the call; in the backward the ranks' shares of
            hidden's gradient are summed, in fp32, by one all-reduce. Without is_top1 and rank.
        reduce_hidden_grad: False leaves that sum to the caller (Megatron's column-parallel region, DTensor's Partial).
        check: as for token_logprobs.
        backend: as for policy_loss.

    Returns:
        TokenStats, as for token_logprobs.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    if vocab is not None:
        refuse_beside_vocab(vocab, keep_mask_for=keep_mask_for)
        return vocab.linear_token_logprobs(
            hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
            keep_mask=keep_mask, row_mask=row_mask, ignore_index=ignore_index, outputs=outputs,
            compute_dtype=compute_dtype, memory_budget=memory_budget, main_grad=main_grad,
            reduce_hidden_grad=reduce_hidden_grad, backend=backend, check=check,
        )  # fmt: skip
    head = head_arguments(
        hidden, weight, bias, temperature, softcap, logit_scale, keep_mask, compute_dtype, memory_budget, main_grad
    )
    from_logits.check_ids(head.like, ids, outputs)
    chosen = backends.choose(backend, hidden.device)
    check_main_grad_backend(main_grad, chosen)
    values: dict[str, Tensor] = {}
    parts = list(from_logits.by_mask(outputs, head.transform, keep_mask_for))
    for transform, names in parts:
        inputs = replace(head, transform=transform).inputs(ids, row_mask, ignore_index)
        asked = [name for name in names if name not in kernel_ops.ALWAYS]
        # Two heads' logits would take the budget twice.
        keep = dispatch.to_keep(chosen, inputs) if len(parts) == 1 else "nothing"
        found = dispatch.linear_token_logprobs(chosen, inputs, asked, main_grad, keep)
        results = dict(zip(kernel_ops.RESULTS, found, strict=True))
        values |= {name: results[name] for name in names}
    rows = hidden.shape[:-1]
    return TokenStats({name: values[name].view(ids.shape if name in kernel_ops.PER_ID else rows) for name in outputs})


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None, main_grad: Tensor | None
) -> None:
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] == 0:
        raise wrong("hidden", f"shape {list(hidden.shape)}", "[N, D] or [B, T, D] with D >= 1")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise wrong("weight", f"shape {list(weight.shape)}", f"[V, {hidden.shape[-1]}] for this hidden, V >= 1")
    if bias is not None:
        _check_bias(bias, weight)
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise wrong("compute_dtype", compute_dtype, ", ".join(map(str, DTYPES)))
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            _check_factor(name, x, hidden, compute_dtype)
    if main_grad is not None:
        _check_main_grad(main_grad, weight)


def _check_factor(name: str, x: Tensor, hidden: Tensor, compute_dtype: torch.dtype | None) -> None:
    if x.device != hidden.device:
        raise wrong(name, f"device {x.device}", f"the device of hidden, {hidden.device}")
    if x.dtype not in DTYPES:
        raise wrong(name, f"dtype {x.dtype}", ", ".join(map(str, DTYPES)))
    if x.dtype != hidden.dtype and compute_dtype is None:
        raise wrong(name, f"dtype {x.dtype}", f"that of hidden, {hidden.dtype}, or any beside compute_dtype")
    # A copy of hidden is made where it is needed; the weight is too large for one a call.
    if x is not hidden and made_in_inference_mode(x):
        raise wrong(name, "a tensor made in inference mode", f"one that autograd may save ({name}.clone(), once)")


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    check_tensor("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise wrong("bias", f"shape {list(bias.shape)}", f"[{weight.shape[0]}]")


def _check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    check_tensor("main_grad", main_grad)
    accepted = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.shape != weight.shape or main_grad.dtype != accepted or main_grad.device != weight.device:
        given = f"{main_grad.dtype} {list(main_grad.shape)} on {main_grad.device}"
        raise wrong("main_grad", given, f"{accepted} {list(weight.shape)} on {weight.device}")
    if not main_grad.is_contiguous():
        raise wrong("main_grad", f"strides {main_grad.stride()}", "a contiguous tensor")
    if torch.compiler.is_compiling():
        raise wrong("main_grad", "a tensor while torch.compile traces", "None: a traced graph may not write to it")


def check_main_grad_backend(main_grad: Tensor | None, chosen: backends.Backend) -> None:
    if main_grad is not None and chosen.is_reference:
        raise wrong("main_grad", "a tensor", "None: the reference backend leaves its backward to autograd")
