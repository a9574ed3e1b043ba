"""How an op gets its derivative: registered with torch for traces, and as a plain autograd.Function for eager calls.

A derivative is two functions: save(ctx, inputs, output), and backward(ctx, *upstream), which returns the gradients of
the op's first inputs; the others have none. save saves these first inputs even where the backward reads none of them:
a second derivative, which is refused, finds its way by them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from . import ranges


class _Functions(NamedTuple):
    """eager: its forward takes ctx, which costs a call 20 us less than a setup_context; transformed: for torch.func,
    which wants one."""

    op: Callable
    differentiable: int
    eager: type[torch.autograd.Function]
    transformed: type[torch.autograd.Function]


BY_REFERENCE = "once (backend='reference' differentiates as often as you like)"

_FUNCTIONS: dict[tuple[str | None, str], _Functions] = {}


def register_derivative(
    namespace: str, op: str, save: Callable, backward: Callable, differentiable: int = 1, accepted: str = BY_REFERENCE
) -> None:
    """differentiable: how many of the op's first inputs may require a gradient. accepted: as for once."""
    found = getattr(getattr(torch.ops, namespace), op).default
    takes_lists = any("Tensor" in str(x.type) and "List" in str(x.type) for x in found._schema.arguments)

    def setup_context(ctx, inputs, output):
        save(ctx, inputs, output)
        ctx.nothing = [_nothing(x) if takes_lists else None for x in inputs]

    def padded(ctx, *upstream):
        grads = backward(ctx, *upstream)
        return *grads, *ctx.nothing[len(grads) :]

    backward = once(backward, f"{namespace}.{op}", accepted)
    torch.library.register_autograd(f"{namespace}::{op}", padded, setup_context=setup_context)
    functions = (make(found, save, backward) for make in (_eager, _transformed))
    _FUNCTIONS[namespace, op] = _Functions(found, differentiable, *functions)


def transformed() -> bool:
    """Whether torch.compile traces or torch.func transforms: gradients are not to be made in a forward there."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_last_use(ctx: Any) -> bool:
    """Of what a backward has saved: no caller holds it, its graph is gone after it, and nobody traces or transforms."""
    if not getattr(ctx, "alone", False) or transformed():
        return False
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return not kept and torch._C._len_torch_dispatch_stack() == 0


class _Refuse(torch.autograd.Function):
    """Gradients as they are; whoever differentiates them by what is linked gets an error."""

    @staticmethod
    def forward(ctx, message, grads, *linked):
        ctx.message = message
        return tuple(g if g is None else g.detach() for g in grads)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(ctx.message)


def once(backward: Callable, name: str, accepted: str = BY_REFERENCE) -> Callable:
    """backward, whose results raise where they are differentiated. Torch's once_differentiable looks at the upstream
    gradients alone: a gradient penalty or a Hessian would lack the kernel's part in silence. What leads from a result
    to the op's inputs are the inputs that it saved."""
    message = f"{name}: differentiated twice, accepted: {accepted}."

    def refusing(ctx, *upstream):
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        inputs = [x for x in ctx.saved_tensors if x is not None and x.requires_grad]
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if torch._C._are_functorch_transforms_active():  # call() has counted the levels
            return grads
        return _Refuse.apply(message, grads, *inputs, *upstream)

    return refusing


def _nothing(x: object) -> list[None] | None:
    """The gradient of an input without one: of an op that takes lists of tensors torch wants a list for each, and for
    each empty list."""
    return [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(y, Tensor) for y in x) else None


def _eager(op: Callable, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *differentiable, rest = args  # one tuple: apply() looks at each of its arguments several times
            inputs = (*differentiable, *rest)
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            save(ctx, inputs, output)
            ctx.alone = True  # our fronts hand none of the gradients among the results on
            return output

        @staticmethod
        def backward(ctx, *upstream):
            return *backward(ctx, *upstream), None

    return Eager


def _transformed(op: Callable, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
    class Transformed(torch.autograd.Function):
        forward = staticmethod(lambda *inputs: op(*inputs))
        setup_context = staticmethod(save)

        @staticmethod
        def backward(ctx, *upstream):
            grads = backward(ctx, *upstream)
            return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))

    return Transformed


def call(namespace: str | None, op: str, *inputs: Any) -> Any:
    """The op's results, with their derivative. Torch knows the derivative of the op itself, and a trace needs no more;
    its eager way there, torch.library's, takes 20 us of Python without a gradient and 100 us with one."""
    if torch.compiler.is_compiling():
        return _FUNCTIONS[namespace, op].op(*inputs)
    if ranges.wanted():
        with ranges.around(namespace, op, inputs):
            return _called(namespace, op, inputs)
    return _called(namespace, op, inputs)


def _called(namespace: str | None, op: str, inputs: tuple[Any, ...]) -> Any:
    found, differentiable, eager, transformed = _FUNCTIONS[namespace, op]
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, inputs)
    leading = inputs[:differentiable]
    if not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leading)):
        with torch._C._AutoDispatchBelowAutograd():
            return found(*inputs)
    if torch._C._are_functorch_transforms_active():
        if sum(level.key() == TransformType.Grad for level in get_interpreter_stack() or ()) > 1:
            raise RuntimeError(f"{op}: inside two levels of torch.func.grad, accepted: one, or backend='reference'.")
        return transformed.apply(*inputs)
    return eager.apply(*leading, inputs[differentiable:])


def _refuse_tangents(op: str, inputs: tuple[Any, ...]) -> None:
    """The kernels have no forward-mode derivative; below autograd a tangent would be lost in silence."""
    levels = get_interpreter_stack() or ()
    dual = (isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)
    if any(level.key() == TransformType.Jvp for level in levels) or any(dual):
        raise RuntimeError(f"{op}: forward-mode AD, accepted: reverse mode, or backend='reference'.")
