"""What stands for a head and its logits while a model's own forward runs."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import described, wrong


class StandIn(nn.Module):
    """Where the head stands while the model's own forward runs."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # some forwards ask for their dtype

    def forward(self, hidden: Tensor) -> "Logits":
        return Logits(hidden)


@dataclass(frozen=True, eq=False)
class Logits:
    """logit_scale h, or softcap tanh(logit_scale h / softcap), of h = head(hidden), that nobody computes; it notes what
    a forward does to it."""

    hidden: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def __mul__(self, factor: Any) -> "Logits":
        if not isinstance(factor, (int, float)):
            raise self._refused(f"a product with {described(factor)}")
        capped = None if self.softcap is None else self.softcap * factor
        return replace(self, logit_scale=self.logit_scale * factor, softcap=capped)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "Logits":
        return self * (1 / divisor if isinstance(divisor, (int, float)) else divisor)

    def tanh(self) -> "Logits":
        if self.softcap is not None:
            raise self._refused("a second tanh")
        return replace(self, softcap=1.0)

    def _itself(self, *_: Any, **__: Any) -> "Logits":
        return self  # statistics are fp32 (fp64 for fp64) whatever dtype a forward gives its logits

    float = to = contiguous = _itself

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> "Logits":
        if function is torch.tanh:
            return args[0].tanh()
        raise cls._refused(f"torch.{getattr(function, '__name__', function)}")

    def _unknown(self, *_: Any) -> Any:
        raise self._refused("an index, a sum or a sign")

    __getitem__ = __setitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __neg__ = _unknown

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else self._refused(name)

    @staticmethod
    def _refused(what: str) -> ValueError:
        return wrong("logits of a fused lm_head", what, "a scale, a softcap and the loss (unfuse_lm_head otherwise)")
