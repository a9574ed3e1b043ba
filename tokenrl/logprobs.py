"""token_logprobs: log-prob and entropy of given ids from logits, in one pass over the vocabulary."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import backends, reference
from .errors import unknown, wrong

OUTPUTS = ("logp", "entropy")
IGNORED = -100
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class TokenStats:
    """What token_logprobs was asked for: attributes named like the outputs, each shaped like ids; iterates in the order asked for."""

    def __init__(self, values: dict[str, Tensor]):
        self._values = values

    def __getattr__(self, name: str) -> Tensor:
        values = self.__dict__.get("_values", {})
        if name in values:
            return values[name]
        raise AttributeError(f"TokenStats has no {name!r}; this call asked for outputs {', '.join(values)}")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._values.values())

    def __repr__(self) -> str:
        return f"TokenStats({', '.join(f'{name}={tuple(value.shape)}' for name, value in self._values.items())})"


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = OUTPUTS,
    backend: str | None = None,
) -> TokenStats:
    """Log-prob of each id and entropy of its distribution: z = logits / temperature, lse = log sum_v e^z_v.

        logp = z_id - lse                d logp / d z_v = 1[v = id] - p_v
        entropy = -sum_v p_v log p_v     d entropy / d z_v = -p_v (log p_v + entropy)

    logits: [N, V] or [B, T, V], bf16, fp16, fp32 or fp64; strided views are read in place as long as the last stride
    is 1. -inf logits have
    p = 0. ids: integers [N] or [B, T] in [0, V), already aligned with the logits (never shifted here); -100 gives 0
    and no gradient.
    On a GPU an id outside gives nan. temperature: a positive number. outputs: any of "logp", "entropy".
    Returns TokenStats of fp32 (fp64 for fp64 logits). The forward allocates its outputs only; the backward recomputes
    p from lse.
    """
    _check(logits, ids, temperature, outputs)
    chosen = backends.choose(backend, logits.device)
    as_rows = logits if logits.dim() == 3 else logits.unsqueeze(0)
    if as_rows.stride(-1) != 1 and as_rows.shape[-1] > 1:
        as_rows = as_rows.contiguous()
    rows = ids.to(torch.int64).reshape(as_rows.shape[:-1]).contiguous()
    run = reference.token_logprobs if chosen.namespace is None else chosen.ops.token_logprobs
    logp, entropy, _ = run(as_rows, rows, float(temperature))
    values = {"logp": logp.view(ids.shape), "entropy": entropy.view(ids.shape)}
    return TokenStats({name: values[name] for name in outputs})


def _check(logits: Tensor, ids: Tensor, temperature: float, outputs: Sequence[str]) -> None:
    if logits.dtype not in DTYPES:
        raise wrong("logits", f"dtype {logits.dtype}", ", ".join(map(str, DTYPES)))
    if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
        raise wrong("logits", f"shape {list(logits.shape)}", "[N, V] or [B, T, V] with V >= 1")
    if ids.shape != logits.shape[:-1]:
        raise wrong("ids", f"shape {list(ids.shape)}", f"one id per row of logits, {list(logits.shape[:-1])}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise wrong("ids", f"dtype {ids.dtype}", "int64 or int32")
    if ids.device != logits.device:
        raise wrong("ids", f"device {ids.device}", f"the device of logits, {logits.device}")
    if not (isinstance(temperature, (int, float)) and 0 < temperature < float("inf")):
        raise wrong("temperature", temperature, "a positive finite number")
    for name in outputs:
        if name not in OUTPUTS:
            raise unknown("outputs", name, OUTPUTS)
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        if ((ids != IGNORED) & ((ids < 0) | (ids >= logits.shape[-1]))).any():
            raise wrong(
                "ids",
                f"values from {ids.min()} to {ids.max()}",
                f"0 to {logits.shape[-1] - 1}, or -100 to ignore a row",
            )
