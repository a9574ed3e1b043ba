"""Statistics of the tokens by name, and who makes them where the vocabulary lies on several ranks."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class TokenStats:
    """What token_logprobs was asked for: attributes named like the outputs; iterates in the order asked for."""

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


class Vocabulary(Protocol):
    """What lies on several ranks: tokenrl.distributed.VocabShard."""

    def token_logprobs(self, logits: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
    def linear_token_logprobs(self, hidden: Tensor, weight: Tensor, ids: Tensor, **how: Any) -> TokenStats: ...
