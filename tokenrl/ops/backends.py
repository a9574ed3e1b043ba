"""Which code runs a call: the backends, the reasons why one cannot run, and the choice."""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..batch.checks import check_name
from ..errors import wrong
from ..objectives.gates import GATES, MAX_PARAMS
from ..objectives.gates.base import Gate
from . import divergence_ops, kernel_ops, linear_divergence_ops, linear_ops, preference_ops

BUILT_IN = frozenset(GATES)  # those with a functor in csrc/gates/table.h; more may be registered
# The gates that the CPU kernels have, and of those that tokenrl.fuse made what its kernel gives of single tokens.
CPU_GATES: dict[str, Callable[..., torch.Tensor] | None] = dict.fromkeys(GATES)
NOT_FUSED: dict[tuple[str, str], str] = {}  # (backend, gate): why tokenrl.fuse made no kernel


@dataclass(frozen=True)
class Backend:
    """One way to run the ops. namespace: of its ops under torch.ops, None for the reference. why_not: the reason why
    it cannot run on a device, or None. automatic: whether a call that names no backend may get it. gates: the names of
    those it has kernels of."""

    name: str
    namespace: str | None
    why_not: Callable[[torch.device], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True
    gates: Callable[[], Collection[str]] = lambda: BUILT_IN

    @property
    def is_reference(self) -> bool:
        return self.namespace is None

    def why_not_gate(self, gate: str | None) -> str | None:
        """Why a gate of that name cannot run on it, or None."""
        if gate is None or self.namespace is None or gate in self.gates():
            return None
        why = NOT_FUSED.get((self.name, gate))
        return f"it has no kernel of the gate {gate!r}" + (f": {why}" if why else "")

    def why_not_call(self, device: torch.device, gate: str | None, own: str | None) -> str | None:
        """Why it cannot run on a device what choose() describes, or None."""
        no_kernel = f"it has no kernel of {own}" if own is not None and not self.is_reference else None
        return self.why_not(device) or self.why_not_gate(gate) or no_kernel

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.namespace or "")


def choose(name: str | None, device: torch.device, gate: str | None = None, own: str | None = None) -> Backend:
    """The backend for a call on `device`, of an objective with that gate, or with a part of its own that no kernel
    knows: the named one, else TOKENRL_BACKEND, else the first that can run it."""
    argument = "backend"
    if name is None and (name := os.environ.get("TOKENRL_BACKEND") or None):
        argument = "TOKENRL_BACKEND, the environment's backend"
    if name is not None:
        check_name(argument, name, BACKENDS)
        reason = BACKENDS[name].why_not_call(device, gate, own)
        if reason is None:
            return BACKENDS[name]
        raise RuntimeError(f"backend {name!r} cannot run on {device.type}: {reason}\n{reasons(device, gate, own)}")
    for backend in BACKENDS.values():
        if backend.automatic(device) and backend.why_not_call(device, gate, own) is None:
            return backend
    raise RuntimeError(f"no backend can run on {device.type}:\n{reasons(device, gate, own)}")


def reasons(device: torch.device, gate: str | None = None, own: str | None = None) -> str:
    """One line per backend: whether it can run on `device`, or why not."""
    found = {name: b.why_not_call(device, gate, own) for name, b in BACKENDS.items()}
    return "\n".join(f"  {name}: {reason or 'can run'}" for name, reason in found.items())


_LIBRARY = Path(__file__).parents[1] / "_ops.so"


def _load_native() -> str | None:
    """Loads the C++ op library; the reason if there is none."""
    if not _LIBRARY.exists():
        built = importlib.util.find_spec("tokenrl._build")
        reason = getattr(importlib.import_module("tokenrl._build"), "NATIVE_REASON", None) if built else None
        return reason or f"the extension is not built ({_LIBRARY.name} is missing; pip install . builds it)"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    return None


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        from .. import triton_kernels  # type: ignore[attr-defined]  # noqa: F401  (defines torch.ops.tokenrl_triton)
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


NATIVE_REASON = _load_native()
TRITON_REASON = _load_triton()
_INTERPRET = os.environ.get("TRITON_INTERPRET")
if TRITON_REASON is None:
    from ..triton_kernels.launch import INTERPRETED, MADE_ALIKE
TRITON_GATES = {} if TRITON_REASON else importlib.import_module("tokenrl.triton_kernels.gates").GATES


@functools.cache
def _ask_cuda(device: int) -> str | None:
    refusal = ctypes.CDLL(str(_LIBRARY)).tokenrl_cuda_refusal
    refusal.restype = ctypes.c_char_p
    reason = refusal(device)
    return reason and f"{reason.decode()} (tokenrl doctor says what to do)"


def _cuda_refusal(device: int) -> str | None:
    """Why no CUDA kernel runs on a GPU that torch sees: an old driver, or no code for it."""
    return _ask_cuda(device)


# What torch.compiler.assume_constant_result does; that imports the compiler, which takes twice as long as torch itself.
_cuda_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_native(kind: str) -> Callable[[torch.device], str | None]:
    missing = NATIVE_REASON
    if not missing and not torch._C._dispatch_has_kernel_for_dispatch_key("tokenrl::objective", kind.upper()):
        missing = "built without CUDA (no nvcc was found, or TOKENRL_CUDA=0)"

    def why_not(device: torch.device) -> str | None:
        if missing:
            return missing
        if device.type != kind:
            return f"runs {kind} tensors, these are on {device.type}"
        if kind == "cpu" or not torch.cuda.is_available():  # tensors of a GPU that is not there are only traced
            return None
        return _cuda_refusal(torch.cuda.current_device() if device.index is None else device.index)

    return why_not


def _why_not_triton(device: torch.device) -> str | None:
    if TRITON_REASON:
        return TRITON_REASON
    if os.environ.get("TRITON_INTERPRET") != _INTERPRET or not MADE_ALIKE:
        return "TRITON_INTERPRET changed after triton or tokenrl was imported; it is read once (set it before both)"
    if device.type == "cuda" or (device.type == "cpu" and INTERPRETED):
        return None
    return f"runs cuda tensors, these are on {device.type} (the interpreter, TRITON_INTERPRET=1, runs cpu tensors)"


# In the order in which they are chosen. Of the two on a GPU first that whose kernels of logits issue fewer instructions
# per logit (tests/kernels/test_issue_slots.py, test_triton_aot.py).
BACKENDS = {
    "cuda": Backend("cuda", "tokenrl", _why_not_native("cuda")),
    "cpu": Backend("cpu", "tokenrl", _why_not_native("cpu"), gates=lambda: CPU_GATES),
    "triton": Backend(
        "triton", "tokenrl_triton", _why_not_triton, lambda device: device.type == "cuda", lambda: TRITON_GATES
    ),
    "reference": Backend("reference", None, lambda device: None),
}
PACKAGED = tuple(BACKENDS)


def register(namespace: str) -> None:
    """Gives the kernels of a namespace their fakes and derivatives, and the ops that are made of them."""
    for ops in (kernel_ops, divergence_ops, preference_ops, linear_ops, linear_divergence_ops):
        ops.register(namespace)


if NATIVE_REASON is None:
    register("tokenrl")
if TRITON_REASON is None:
    register("tokenrl_triton")


def register_triton(gate: type[Gate], function: Callable[..., Any]) -> None:
    """The kernel of a registered gate: a @triton.jit function

        function(s, x, logp, advantage, t, *parameters) -> value, d_s, d_logp, low, high, dual

    of blocks of tokens, with parameters in the order of the gate's params(), as in triton_kernels/gates.py. `tokenrl
    parity --gate` holds it to the gate's value and derivatives; nothing derives one from the other.

    Args:
        gate: the class of a registered objective's gate.
        function: of blocks of tokens, as above.

    Raises:
        RuntimeError: where Triton cannot run, with the reason.
        ValueError: for a gate that is not registered, has a Triton function, or too many parameters.
    """
    if TRITON_REASON:
        raise RuntimeError(f"gate {gate.name!r} gets no Triton kernel: {TRITON_REASON}")
    if GATES.get(gate.name) is not gate:
        raise wrong("gate", gate.__name__, "a gate of a registered objective (tokenrl.register)")
    if gate.name in TRITON_GATES:
        raise wrong("gate", repr(gate.name), "a gate that has no Triton function yet")
    if len(gate().params()) > MAX_PARAMS:
        raise wrong("gate", f"{len(gate().params())} parameters", f"at most {MAX_PARAMS} in a kernel")
    add_triton(gate.name, function, reads_position=True)


def add_triton(gate: str, function: Callable[..., Any], reads_position: bool) -> None:
    from ..triton_kernels.gates import NEED_POSITION

    TRITON_GATES[gate] = function
    if reads_position:
        NEED_POSITION.add(gate)
