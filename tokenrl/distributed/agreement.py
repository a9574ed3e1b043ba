"""What all ranks of a group must have alike is compared before the first collective of the data, whose sizes it
decides: where ranks differ, each of them raises the same error within one exchange, instead of a hang or wrong numbers.

    with Agreement("token_logprobs", group, device) as agreed:
        ...                                       checks of arguments, which may raise on one rank alone
        agreed.same(rows=list(shape), outputs=outputs)
        agreed.contents(ids=ids)
"""

import hashlib
import os
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import wire

FIELDS = 30  # at most; the two numbers before them: a flag of failure, and what the fields are
RUN_WIDE = "TOKENRL_DIST_CHECK"  # "0": no call compares


def _hashed(text: str) -> int:
    """Alike in every process, as hash() is not."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Agreement:
    """check: False leaves the comparison out; errors of this rank's own are then its own."""

    def __init__(self, what: str, group: dist.ProcessGroup, device: torch.device, check: bool = True):
        self.what, self.group, self.device = what, group, device
        self.check = check and os.environ.get(RUN_WIDE) != "0" and not torch.compiler.is_compiling()
        self.texts: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}

    def same(self, **values: Any) -> None:
        """Values whose text says all; of some the compiler cannot make it."""
        if self.check:
            self.texts |= {name: str(value) for name, value in values.items()}

    def contents(self, **tensors: Tensor) -> None:
        """Integers or bools."""
        if self.check:
            self.sums |= {name: wire.checksum(x) for name, x in tensors.items()}

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if not self.check or (error is not None and not isinstance(error, Exception)):
            return
        names = [*self.texts, *self.sums]
        assert len(names) <= FIELDS
        numbers = [int(error is not None), _hashed(" ".join([self.what, *names])), *map(_hashed, self.texts.values())]
        header = torch.tensor(numbers + [0] * (2 + FIELDS - len(numbers)), device=self.device)
        for place, value in enumerate(self.sums.values(), len(numbers)):
            header[place] = value
        every = wire.all_gather(header, self.group)
        failed, *rest = every.t().tolist()
        if not any(failed) and all(len({*column}) == 1 for column in rest):
            return
        own = {"error": None if error is None else f"{type(error).__name__}: {error}", "texts": self.texts,
               "what": self.what, "sums": [*self.sums]}  # fmt: skip
        found = wire.all_gather_objects(own, self.group)
        if error is not None and not isinstance(error, ValueError):
            return  # itself on this rank; the others are told
        raise ValueError(f"{self.what}: {_said(found, rest)}") from error


def _said(found: list[dict[str, Any]], columns: list[list[int]]) -> str:
    failed = [f"rank {rank}: {one['error']}" for rank, one in enumerate(found) if one["error"]]
    if failed:
        return "; ".join(failed)
    shapes = [(one["what"], [*one["texts"]], one["sums"]) for one in found]
    if any(shape != shapes[0] for shape in shapes):
        return f"ranks do not agree: {', '.join(f'{one[0]} on rank {rank}' for rank, one in enumerate(shapes))}"
    parts = []
    for name in found[0]["texts"]:
        values = [one["texts"][name] for one in found]
        if len({*values}) > 1:
            parts.append(f"{name}: {', '.join(f'{value} on rank {rank}' for rank, value in enumerate(values))}")
    first = 1 + len(found[0]["texts"])
    for name, column in zip(found[0]["sums"], columns[first:], strict=False):
        ranks: dict[int, list[int]] = {}
        for rank, value in enumerate(column):
            ranks.setdefault(value, []).append(rank)
        if len(ranks) > 1:
            parts.append(f"{name} (contents): differ between ranks {' and '.join(map(str, ranks.values()))}")
    return f"ranks do not agree: {'; '.join(parts)}"
