"""Ranges: what an op is called where somebody profiles, in torch.profiler, Nsight and Perfetto.

    tokenrl::token_logprobs forward [8192, 151936] bf16 cuda

op, way, shape ([N], [N, V] or, from hidden states, [N, D, V]), dtype, backend. Ops inside of ops have theirs. Where
nobody profiles there are none. A trace by torch.compile holds none either: its ops have the names of the dispatcher.
"""

import functools
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy
import torch
from torch import Tensor
from torch.autograd import profiler

Params = ParamSpec("Params")
Result = TypeVar("Result")

PREFIX = "tokenrl::"
SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Of Nsight Systems and Nsight Compute, in what they run: they read NVTX alone.
_NSIGHT = any(name in os.environ for name in ("NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE"))
_NOTHING = nullcontext()


class Range(NamedTuple):
    """inputs: of the op; where autograd's own torch is all there is, what tells its shape."""

    op: str
    way: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    backend: str
    inputs: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.op} {self.way} {list(self.shape)} {SHORT[self.dtype]} {self.backend}"


watchers: list[Callable[[Range], None]] = []  # each is told of a range before it begins
memory_watchers: list[Callable[[int], None]] = []  # and of bytes that are not torch's, as they come and, negative, go


def tell_of_memory(memory: numpy.ndarray) -> None:
    """Torch's profiler sees what torch allocates alone."""
    for told in memory_watchers:
        told(memory.nbytes)
        weakref.finalize(memory, told, -memory.nbytes)


def _rows(x: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return (prod(x.shape[:-1]), x.shape[-1]), x.dtype


def _head(inputs: tuple[Any, ...]) -> tuple[tuple[int, ...], torch.dtype]:
    hidden, weight, _, ids, *_ = inputs
    dtype = next(getattr(torch, x) for x in inputs if isinstance(x, str))  # compute_dtype is the first string
    return (hidden.shape[0], hidden.shape[1], weight.shape[0]), dtype


# Of the inputs of an op: shape and dtype of what it works on. Others work on their first tensor.
_WORKS_ON: dict[str, Callable[[tuple[Any, ...]], tuple[tuple[int, ...], torch.dtype]]] = {
    "aggregation_weights": lambda inputs: ((inputs[2],), torch.float64),
    "token_logprobs": lambda inputs: _rows(inputs[0]),
    "token_logprobs_backward": lambda inputs: _rows(inputs[4]),
    "token_logprobs_backward_": lambda inputs: _rows(inputs[4]),
    "divergence": lambda inputs: _rows(inputs[0]),
    "divergence_backward": lambda inputs: _rows(inputs[1]),
    "linear_token_logprobs": _head,
    "linear_token_logprobs_backward": _head,
    "linear_policy_loss": _head,
    "linear_divergence": _head,
}


def wanted() -> bool:
    """Whether anybody profiles."""
    return profiler._is_profiler_enabled or _NSIGHT


def around(namespace: str | None, op: str, inputs: tuple[Any, ...]) -> AbstractContextManager[Any]:
    """The range of a call of an op; nothing where nobody profiles. namespace: of the kernels, None: the reference."""
    if torch.compiler.is_compiling() or not wanted():
        return _NOTHING
    if op in _WORKS_ON:
        shape, dtype = _WORKS_ON[op](inputs)
    else:
        first = next(x for x in inputs if isinstance(x, Tensor))
        shape, dtype = tuple(first.shape), first.dtype
    name, backward, _ = op.partition("_backward")
    return _marked(
        Range(name, "backward" if backward else "forward", shape, dtype, _backend(namespace, inputs), inputs)
    )


def around_backward(namespace: str, op: str, *saved: Tensor) -> AbstractContextManager[Any]:
    """The range of a backward that is no op: [N] of one tensor, or [N, D, V] of hidden and weight."""
    if not wanted():
        return _NOTHING
    shape = (saved[0].shape[0], saved[0].shape[1], saved[1].shape[0]) if len(saved) > 1 else tuple(saved[0].shape)
    return _marked(Range(op, "backward", shape, saved[0].dtype, _backend(namespace, saved), saved))


def _backend(namespace: str | None, inputs: tuple[Any, ...]) -> str:
    if namespace is None:
        return "reference"
    _, _, own = namespace.partition("_")
    return own or next(x.device.type for x in inputs if isinstance(x, Tensor))


@contextmanager
def _marked(range: Range) -> Iterator[None]:
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        yield  # or a trace would hold the range as an op
        return
    for watch in watchers:
        watch(range)
    with ExitStack() as stack:
        if profiler._is_profiler_enabled:
            stack.enter_context(profiler.record_function(range.name))
        if _NSIGHT and torch.cuda.is_available():
            stack.enter_context(torch.cuda.nvtx.range(range.name))
        yield


class _Ranged:
    """The ops of a namespace, each call in its range."""

    def __init__(self, namespace: str):
        self._namespace = namespace

    def __getattr__(self, op: str) -> Callable[..., Any]:
        found = getattr(getattr(torch.ops, self._namespace), op)

        def call(*inputs: Any) -> Any:
            with around(self._namespace, op, inputs):
                return found(*inputs)

        return call


def kernels(namespace: str) -> Any:
    """torch.ops of a namespace, in ranges where somebody profiles."""
    if torch.compiler.is_compiling() or not wanted():
        return getattr(torch.ops, namespace)
    return _Ranged(namespace)


def ranged(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """A function of the reference, in the range of the op whose name it bears. Its backward is autograd's, in none."""

    @functools.wraps(function)
    def call(*inputs: Params.args, **more: Params.kwargs) -> Result:
        with around(None, function.__name__, inputs):
            return function(*inputs, **more)

    return call
