"""A case: an op on inputs, its eager spelling, and the work of an ideal kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tokenrl.instruments.machine_limits import Work


@dataclass(frozen=True)
class Gemms:
    """The limit of an op that starts from hidden states: bare GEMMs, 1 in the forward, `both` with the backward.

    flops: of one. share: of the tokens that are active; the others need no GEMM, the bare ones are of all tokens.
    """

    flops: int
    both: int
    share: float = 1.0

    @property
    def counts(self) -> tuple[int, int]:
        return 1, self.both


class Spec(NamedTuple):
    """Which case. shape: rows x columns, or tokens x width x vocabulary of an op that starts from hidden states."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    variant: str = ""


@dataclass(frozen=True)
class Case:
    """run(backend, *inputs) and eager(*inputs) return a tuple of tensors; the first `leaves` inputs get gradients.

    cotangents: what flows into each result. rows: the rows that are checked against the truth, None for all of them;
    only an op whose rows do not meet may name some. small: a case of fewer rows, built alike, which is what is held to
    the tolerance rule where the truth of this one would not fit; None: this one is. The limit is that of forward and
    backward, or of gemms. forward_saves: the timed forward keeps what a backward needs; where an op computes its
    gradients in the forward, the forward is timed under no_grad, without them.
    """

    spec: Spec
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    forward: Work | None = None
    backward: Work | None = None
    rows: Tensor | None = None
    leaves: int = 1
    gemms: Gemms | None = None
    small: Case | None = None
    forward_saves: bool = True

    @property
    def op(self) -> str:
        return self.spec.op

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, str(list(self.spec.shape)), self.spec.dtype, self.spec.variant)))

    @property
    def held(self) -> Case:
        """The case that is held to the tolerance rule."""
        return self.small or self

    def checked(self, x: Tensor) -> Tensor:
        """The rows of a tensor (one per row of the first input) that are held to the tolerance rule."""
        return x if self.rows is None or x.dim() == 0 else x[self.rows]
