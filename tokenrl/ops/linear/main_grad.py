"""A weight's gradient that is added to a tensor of the caller, as Megatron's main_grad, in place of weight.grad."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MainGrad:
    """total: [V, D] in sum_dtype. told: the parameter, or rows of it without its padding, where a hook of Megatron's
    DDP reads on it whether its gradient went to main_grad. Kept beside what autograd saves, as a checkpoint gives back
    a copy without attributes."""

    total: Tensor
    told: Tensor | None

    @classmethod
    def of(cls, main_grad: Tensor | None, weight: Tensor) -> "MainGrad | None":
        if main_grad is None:
            return None
        parameter = _parameter(weight)
        told = parameter.is_leaf and hasattr(parameter, "grad_added_to_main_grad")
        return cls(main_grad, weight if told else None)

    def add(self, grad: Tensor, by: Tensor) -> Tensor | None:
        """Adds `by` times what a forward has made; the gradient of the weight beside it."""
        self.total.addcmul_(grad, by.to(grad.dtype))
        return self.beside()

    def beside(self) -> Tensor | None:
        """The gradient of a weight whose own was added: none. Megatron's hook asserts that there is one, of any memory,
        and leaves it out by the flag; with zero_out_wgrad it adds it all the same."""
        if self.told is None:
            return None
        parameter = _parameter(self.told)
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return (torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like)(self.told)


def _parameter(weight: Tensor) -> Tensor:
    """That of which these are rows, or all."""
    return weight if weight._base is None else weight._base
