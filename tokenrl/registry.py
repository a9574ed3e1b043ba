"""Objectives and gates of your own, beside those of the tables."""

from .backends import TRITON_GATES, TRITON_REASON
from .errors import wrong
from .gate import Gate
from .gates import GATES
from .objectives import OBJECTIVES, Objective


def register(row: Objective) -> Objective:
    """Adds a row to the table of objectives: its name is then accepted wherever an objective's is. Returns the row.

    Its gate may be of a class of your own: a subclass of tokenrl.Gate, decorated with tokenrl.parametrised, with a name
    and a value in torch. It runs at once on the reference backend, with autograd's derivative, and calls that name no
    backend get that one. Given its Triton function (register_triton) it runs on Triton too. The C++ backends run the
    gates of csrc/gates.h alone, and say so.
    """
    if row.name in OBJECTIVES:
        raise wrong("name", repr(row.name), "a name that is not in the table yet")
    GATES.setdefault(row.gate.name, type(row.gate))
    OBJECTIVES[row.name] = row
    return row


def register_triton(gate: type[Gate], function) -> None:
    """The kernel of a registered gate: a @triton.jit function

        function(s, x, logp, advantage, t, *parameters) -> value, d_s, d_logp, low, high, dual

    of blocks of tokens, with parameters in the order of the gate's params(), as in triton_kernels/gates.py. It is held
    to the gate's value by tokenrl.parity or the tests' rule; nothing derives one from the other.
    """
    if TRITON_REASON:
        raise RuntimeError(f"gate {gate.name!r} gets no Triton kernel: {TRITON_REASON}")
    from .triton_kernels.gates import NEED_POSITION
    from .triton_kernels.objective import MAX_PARAMS

    if GATES.get(gate.name) is not gate:
        raise wrong("gate", gate.__name__, "a gate of a registered objective (tokenrl.register)")
    if gate.name in TRITON_GATES:
        raise wrong("gate", repr(gate.name), "a gate that has no Triton function yet")
    if len(gate().params()) > MAX_PARAMS:
        raise wrong("gate", f"{len(gate().params())} parameters", f"at most {MAX_PARAMS} in a kernel")
    TRITON_GATES[gate.name] = function
    NEED_POSITION.add(gate.name)
