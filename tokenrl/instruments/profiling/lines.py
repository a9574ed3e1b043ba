"""The lines of a profile: an op, the matrix products and the ops inside of it, what is left; each beside its limit."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...ops.ranges import SHORT
from ..machine_limits import Work, limits, products
from ..progress import tracked
from .accounts import Account, Step

NAME = re.compile(r"tokenrl::(?P<op>\w+) (?P<way>\w+) (?:(?P<shape>\[.*\]) (?P<dtype>\w+) )?(?P<backend>.+)")
LONG = {short: dtype for dtype, short in SHORT.items()}
PRODUCTS, REST, ELSE = "matrix products", "the rest of it", "all else in the step"
LARGEST_BUFFER = 29  # in powers of two, as of machine_limits.limits


@dataclass(frozen=True)
class Line:
    """level: 1 inside of the line of level 0 before it. Seconds of all calls; device: 0 where there is none. limit:
    which one its time at best, `least`, comes from; None where the model has no work."""

    what: str
    level: int
    calls: int
    launches: int
    host: float
    device: float
    shape: tuple[int, ...] = ()
    dtype: str = ""
    backend: str = ""
    read: int = 0
    written: int = 0
    exponentials: int = 0
    flops: int = 0
    limit: str | None = None
    least: float | None = None
    peak: int | None = None
    syncs: int = 0
    kernels: dict[str, list[float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.device or self.host

    @property
    def bytes(self) -> int:
        return self.read + self.written

    @property
    def share(self) -> float | None:
        """Of the limit that it reaches."""
        return None if self.least is None or self.seconds <= 0 else self.least / self.seconds

    def rate(self, amount: int) -> float | None:
        return amount / self.seconds if amount and self.seconds > 0 else None

    def as_dict(self) -> dict[str, Any]:
        kernels = {name: {"calls": int(n), "seconds": t} for name, (n, t) in self.kernels.items()}
        more = {"bytes_per_second": self.rate(self.bytes), "flops_per_second": self.rate(self.flops)}
        return asdict(self) | more | {"share_of_limit": self.share, "kernels": kernels}


def lines_of(step: Step, works: Mapping[tuple[str, ...], Work], device: str) -> list[Line]:
    """works: of all calls of a range, by its path."""
    found = [part for account in step.ours for part in _parts(step, account, works)]
    return [*(_limited(line, device) for line in tracked(found, lambda line: line.what)), _else(step)]


def _parts(step: Step, account: Account, works: Mapping[tuple[str, ...], Work]) -> Iterator[Line]:
    inside = step.inside(account)
    flops = account.flops + sum(a.flops for a in inside)
    yield _line(account, 0, works, flops)
    if not inside and not account.products:
        return
    described = _described(account.name)
    if account.products:
        yield Line(
            PRODUCTS, 1, account.products, account.products, account.products_host, account.products_device,
            shape=described["shape"], dtype=described["dtype"], flops=account.flops,
        )  # fmt: skip
    yield from (_line(a, 1, works, a.flops) for a in inside)
    host = account.host - account.products_host - sum(a.host for a in inside)
    device = account.device - account.products_device - sum(a.device for a in inside)
    launches = account.launches - account.products - sum(a.launches for a in inside)
    yield Line(REST, 1, account.calls, launches, host, max(device, 0.0))


def _described(name: str) -> dict[str, Any]:
    found = NAME.fullmatch(name)
    assert found is not None, name
    shape = tuple(ast.literal_eval(found["shape"])) if found["shape"] else ()
    named = {"what": f"{found['op']} {found['way']}", "backend": found["backend"]}
    return named | {"shape": shape, "dtype": found["dtype"] or ""}


def _line(account: Account, level: int, works: Mapping[tuple[str, ...], Work], flops: int) -> Line:
    described, work = _described(account.name), works.get(account.path, Work(0, 0, 0))
    return Line(
        level=level, calls=account.calls, launches=account.launches, host=account.host, device=account.device,
        read=work.read, written=work.written, exponentials=work.exponentials, flops=flops, peak=account.peak,
        syncs=account.syncs, kernels=dict(account.kernels), **described,
    )  # fmt: skip


def _else(step: Step) -> Line:
    total, ours = step.total, step.ours
    host = step.wall - sum(a.host for a in ours)
    device = total.device - sum(a.device for a in ours)
    launches = total.launches - sum(a.launches for a in ours)
    syncs = total.syncs - sum(a.syncs for a in ours)
    return Line(ELSE, 0, 1, launches, host, max(device, 0.0), syncs=syncs)


def _limited(line: Line, device: str) -> Line:
    """With the limit of this machine that its work meets first."""
    found = [*_moved(line, device), *_multiplied(line, device)]
    if not found:
        return line
    least, limit = max(found)
    return replace(line, least=least, limit=limit)


def _moved(line: Line, device: str) -> Iterator[tuple[float, str]]:
    if line.bytes or line.exponentials:
        size = max(line.read // line.calls, 1)
        power = min(-(-(size - 1).bit_length() // 3) * 3, LARGEST_BUFFER)  # in eighths, as each size is a measurement
        yield limits(device, 1 << power).least(Work(line.read, line.written, line.exponentials))


def _multiplied(line: Line, device: str) -> Iterator[tuple[float, str]]:
    if line.flops and len(line.shape) == 3:
        yield line.flops / product_rate(device, line.dtype, line.shape), "GEMM"


def product_rate(device: str, dtype: str, shape: tuple[int, ...]) -> float:
    """Flops per second of the three products of a head [N, D, V], one after the other."""
    rates = products(device, LONG[dtype], *shape).values()
    return len(rates) / sum(1 / rate for rate in rates)
