"""What a trainer logs, in one transfer. TRL reads each metric where it makes it, and each read waits for the device;
here the numbers stay there until someone looks at one, then all that wait come together."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from trl.trainer import grpo_trainer

from ..hosts import instead


class Transfer:
    """Numbers that are read together."""

    def __init__(self) -> None:
        self.packed: list[Tensor] = []
        self.loose: list[Tensor] = []
        self.count = 0

    @cached_property
    def values(self) -> list[float]:
        self.pack()
        return torch.cat(self.packed).tolist()

    def pack(self) -> None:
        """One tensor of those added since the last call."""
        if self.loose:
            self.packed.append(torch.cat(self.loose))
            self.loose = []


class Reading:
    """A tensor of a transfer; tolist() makes the transfer."""

    def __init__(self, transfer: Transfer, x: Tensor):
        self.transfer, self.where = transfer, slice(transfer.count, transfer.count + x.numel())
        transfer.loose.append(x.detach().reshape(-1))
        transfer.count += x.numel()

    def tolist(self) -> list[float]:
        return self.transfer.values[self.where]


class Readings:
    """Those of a trainer."""

    def __init__(self) -> None:
        self._transfer = Transfer()

    def add(self, x: Tensor) -> Reading:
        if "values" in vars(self._transfer):  # that one has been made
            self._transfer = Transfer()
        return Reading(self._transfer, x)

    def pack(self) -> None:
        """At the end of a micro-batch, so that many of them wait in few tensors."""
        self._transfer.pack()


class Later:
    """A float that is known when it is used."""

    def __init__(self, read: Callable[[], float]):
        self._read = read

    def __float__(self) -> float:
        return float(self._read())

    def __format__(self, how: str) -> str:
        return format(float(self), how)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_known, args), **{name: _known(x) for name, x in (kwargs or {}).items()})


def share(counts: Reading, of: int, among: int) -> float:
    """The quotient of two of them, NaN of nothing, which TRL leaves out of its means."""
    found = counts.tolist()
    return found[of] / found[among] if found[among] else math.nan


def _known(x: Any) -> Any:
    return float(x) if isinstance(x, Later) else x


def _of_float(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(float(self), name)(*map(_known, others))


for _name in (
    "repr", "bool", "int", "round", "hash", "neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge", "add", "radd",
    "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow",
):  # fmt: skip
    setattr(Later, f"__{_name}__", _of_float(f"__{_name}__"))


class _Items(TorchFunctionMode):
    """x.item() of floats is Later."""

    def __init__(self, readings: Readings):
        super().__init__()
        self.readings = readings

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.item and args[0].is_floating_point():
            reading = self.readings.add(args[0])
            return Later(lambda: reading.tolist()[0])
        return function(*args, **(kwargs or {}))


def nanmin(x: Tensor) -> Tensor:
    """TRL's, which looks at the values first: 0-d, NaN where all are."""
    least = x.masked_fill(x.isnan(), math.inf).amin()
    return least.masked_fill(least == math.inf, math.nan)


def nanmax(x: Tensor) -> Tensor:
    return -nanmin(-x)


@contextmanager
def read_later(readings: Readings) -> Iterator[None]:
    """What TRL's loss logs here, it does not read."""
    with _Items(readings), instead(grpo_trainer, "nanmin", nanmin), instead(grpo_trainer, "nanmax", nanmax):
        yield
