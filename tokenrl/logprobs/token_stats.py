"""Statistics of the tokens by name."""

from collections.abc import Iterator

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
