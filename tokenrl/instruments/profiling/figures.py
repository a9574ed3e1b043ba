"""The figures of a report as SVG, each twice: for a desk and for a phone. Their colours are names, which the page gives
a value in light and in dark."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..ratios import QUANTILES, ByPosition
from .accounts import Memory, Span, Step
from .lines import LONG, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that no figure would use, and the names that stand in their places.
INK, MUTED, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
SERIES = tuple(f"#1000{number:02x}" for number in range(8))
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"series-{i}" for i, c in enumerate(SERIES)}
MOST_SPANS = 400  # of a lane; closer ones are drawn as one


class Size(NamedTuple):
    """Inches, and points of the text, so that the letters have one size on the page."""

    name: str
    width: float
    text: float


DESK, PHONE = Size("desk", 10.0, 8.5), Size("phone", 4.9, 9.5)


def svg(name: str, size: Size, height: float, draw: Callable[["Axes"], None], rows: Sequence[float] = (1,)) -> str:
    """What draw makes of the axes, one below the other; height in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": size.text, "axes.edgecolor": MUTED,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
        "ytick.labelcolor": INK, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
        "axes.facecolor": "none", "figure.facecolor": "none", "legend.labelcolor": INK, "axes.titlesize": size.text,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(size.width, height), layout="constrained")
        axes = figure.subplots(len(rows), 1, sharex=len(rows) > 1, gridspec_kw={"height_ratios": list(rows)})
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return inlined(out.getvalue(), f"{name}-{size.name}")


def inlined(text: str, prefix: str) -> str:
    """An SVG as part of a page: no prologue, ids of its own, the page's font and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font: (?:(\d+) )?([\d.]+px) [^;\"]*", _font, text)
    for colour, name in NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"


def both(
    name: str, draw: Callable[..., None], heights: tuple[float, float], rows: Sequence[float] = (1,)
) -> dict[str, str]:
    """heights: at a desk and on a phone."""
    sizes = zip((DESK, PHONE), heights, strict=True)
    return {size.name: svg(name, size, height, partial(draw, size=size), rows) for size, height in sizes}


def colours(lines: Iterable[Line]) -> dict[str, str]:
    """A colour for each op, the same in every figure."""
    ops = dict.fromkeys(line.what.split()[0] for line in lines if line.backend)
    return {op: SERIES[i % len(SERIES)] for i, op in enumerate(ops)}


class Point(NamedTuple):
    """number: of its line in the table."""

    number: int
    line: Line
    intensity: float
    rate: float


def operations(line: Line) -> int:
    """Flops of matrix products, else exponentials, else one for each number that is written, or token that is read."""
    itemsize = LONG[line.dtype].itemsize if line.dtype else 1
    return line.flops or line.exponentials or line.written // itemsize or line.read


def points(lines: Sequence[Line]) -> list[Point]:
    """The lines that move bytes."""
    found = []
    for number, line in enumerate(lines, 1):
        rate = line.rate(operations(line))
        if line.bytes and rate:
            found.append(Point(number, line, operations(line) / line.bytes, rate))
    return found


def grouped(found: Sequence[Point], near: float = 1.25) -> list[list[Point]]:
    """Points so close that their numbers would lie on each other, together; near: a factor."""
    groups: list[list[Point]] = []
    for point in sorted(found, key=lambda p: (p.intensity, p.rate)):
        for group in groups:
            if all(1 / near < a / b < near for a, b in zip(point[2:], group[0][2:], strict=True)):
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


def roofline(lines: Sequence[Line], machine: dict[str, Any]) -> dict[str, str]:
    """Each op by its operations per byte and per second, under what the machine does at best."""
    shown, named = points(lines), colours(lines)
    if not shown:
        return {}
    products = max((line.flops / line.least for line in lines if line.limit == "GEMM" and line.least), default=None)

    def draw(axes: Any, size: Size) -> None:
        low, high = min(p.intensity for p in shown) / 4, max(p.intensity for p in shown) * 4
        roofs = {"exponentials": machine["exponentials"]} | ({"matrix products": products} if products else {})
        top = max(roofs.values())
        for name, rate in roofs.items():
            axes.plot([rate / machine["read"], high], [rate, rate], color=MUTED, linewidth=1.4)
            # Above the highest and below the others, which may be near it.
            how = {"xytext": (-2, 3)} if rate == top else {"xytext": (-2, -3), "va": "top"}
            axes.annotate(f"{name} {_si(rate)}/s", (high, rate), textcoords="offset points", ha="right", **how)
        edge = min(high, top / machine["read"])
        axes.plot([low, edge], [low * machine["read"], edge * machine["read"]], color=MUTED, linewidth=1.4)
        label = f"bytes {_si(machine['read'])}/s"
        middle = (low * edge) ** 0.5
        axes.annotate(label, (middle, middle * machine["read"]), (6, -size.text), textcoords="offset points", va="top")
        for group in grouped(shown):
            for point in group:
                colour = named.get(point.line.what.split()[0], MUTED)
                axes.plot(point.intensity, point.rate, "o", markersize=size.text, color=colour)
            label = " ".join(f"{point.number}" for point in group)
            axes.annotate(label, group[0][2:], (size.text * 0.8, 0), textcoords="offset points", va="center")
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        axes.set(xlabel="operations per byte", ylabel="operations per second")

    return both("roofline", draw, (4.4, 4.2))


def _si(x: float) -> str:
    for name, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if x >= scale:
            return f"{x / scale:.3g} {name}"
    return f"{x:.3g} "


def merged(spans: Sequence[Span], gap: float) -> list[tuple[float, float]]:
    """(begin, length) of the spans, those closer than a gap as one."""
    found: list[list[float]] = []
    for span in sorted(spans, key=lambda span: span.begin):
        if found and span.begin - found[-1][1] <= gap:
            found[-1][1] = max(found[-1][1], span.end)
        else:
            found.append([span.begin, span.end])
    return [(1e3 * begin, 1e3 * (end - begin)) for begin, end in found]


def without(parts: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted (begin, length) of the parts that lie in none of the others."""
    found = []
    for begin, length in parts:
        end = begin + length
        for other, extent in others:
            if other < end and other + extent > begin:
                if other > begin:
                    found.append((begin, other - begin))
                begin = max(begin, other + extent)
        if end > begin:
            found.append((begin, end - begin))
    return found


def timeline(step: Step, lines: Sequence[Line]) -> dict[str, str]:
    """Our ranges over the step, those inside of others below them, and what else ran."""
    named, gap = colours(lines), step.wall / MOST_SPANS
    depths = sorted({span.depth for span in step.spans}) or [0]
    lanes = [("tokenrl" if depth == 0 else "inside", depth) for depth in depths]
    ours = merged([span for span in step.spans if span.depth == 0], 0.0)
    rest = [("other ops", without(merged(step.other_spans, gap), ours))]
    if step.kernel_spans:
        rest.append(("device", merged(step.kernel_spans, gap)))

    def draw(axes: Any, size: Size) -> None:
        for row, (_, depth) in enumerate(lanes):
            for op, colour in named.items():
                own = [s for s in step.spans if s.depth == depth and _op(s.name) == op]
                for way, alpha in (("forward", 1.0), ("backward", 0.6)):
                    parts = merged([s for s in own if s.name.split()[1] == way], gap)
                    axes.broken_barh(parts, (row - 0.36, 0.72), facecolor=colour, alpha=alpha, linewidth=0)
        for row, (_, parts) in enumerate(rest, len(lanes)):
            axes.broken_barh(parts, (row - 0.36, 0.72), facecolor=MUTED, linewidth=0)
        names = [name for name, _ in (*lanes, *rest)]
        axes.set_yticks(range(len(names)), names)
        axes.set(xlim=(0, 1e3 * step.wall), xlabel="ms")
        axes.grid(False, axis="y")
        axes.invert_yaxis()
        _legend(axes, named, size)

    rows = 0.42 * (len(lanes) + len(rest))
    phone = 0.11 * len(named)
    return both("timeline", draw, (1.3 + rows, 1.2 + rows + phone))


def _op(name: str) -> str:
    return name.split()[0].removeprefix("tokenrl::")


def _legend(axes: Any, named: dict[str, str], size: Size) -> None:
    from matplotlib.patches import Patch

    if named:
        handles = [Patch(facecolor=colour, label=op, linewidth=0) for op, colour in named.items()]
        columns = min(len(named), 2 if size is PHONE else 4)
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def memory(step: Step, lines: Sequence[Line]) -> dict[str, str]:
    """Bytes held over the step, our ranges shaded."""
    held: Memory = step.memory
    if not held.times:
        return {}
    named = colours(lines)

    def draw(axes: Any, size: Size) -> None:
        for op, colour in named.items():
            spans = [s for s in step.spans if s.depth == 0 and _op(s.name) == op]
            for begin, length in merged(spans, step.wall / MOST_SPANS):
                axes.axvspan(begin, begin + length, facecolor=colour, alpha=0.25, linewidth=0)
        at, megabytes = _thinned([0.0, *held.times, step.wall], [0, *held.held, held.held[-1]])
        axes.fill_between(at, megabytes, step="post", facecolor=INK, alpha=0.12, linewidth=0)
        axes.step(at, megabytes, where="post", color=INK, linewidth=1.2)
        axes.set(xlim=(0, 1e3 * step.wall), xlabel="ms", ylabel="MB beyond the beginning")
        axes.set_ylim(bottom=min(0.0, *megabytes))
        _legend(axes, named, size)

    return both("memory", draw, (2.9, 2.7 + 0.11 * len(named)))


def _thinned(times: Sequence[float], held: Sequence[int], most: int = 1500) -> tuple[list[float], list[float]]:
    """As (ms, MB), of many changes the largest of each stretch."""
    stride = -(-len(times) // most)
    at = [1e3 * times[i] for i in range(0, len(times), stride)]
    return at, [max(held[i : i + stride]) / 1e6 for i in range(0, len(held), stride)]


def ratios(found: ByPosition | None) -> dict[str, str]:
    """Quantiles of the ratio, and what was clipped, by the position of a token."""
    if found is None or not found.position:
        return {}

    def draw(axes: Any, size: Size) -> None:
        above, below = axes
        lowest, low, middle, high, highest = (found.quantiles[level] for level in QUANTILES)
        for edges, alpha, label in (((lowest, highest), 0.2, "5 to 95 %"), ((low, high), 0.4, "25 to 75 %")):
            above.fill_between(found.position, *edges, facecolor=SERIES[0], alpha=alpha, linewidth=0, label=label)
        above.plot(found.position, middle, color=SERIES[0], linewidth=1.4, label="median")
        above.axhline(1, color=MUTED, linewidth=0.8)
        above.set(ylabel="ratio")
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        for number, name in enumerate(("low", "high", "dual"), 1):
            share = [100 * x for x in getattr(found, name)]
            below.plot(found.position, share, color=SERIES[number], linewidth=1.4, label=f"{name} bound")
        below.set(ylabel="% clipped", xlabel="position of the token")
        below.set_ylim(0, max(1.0, 1.05 * below.get_ylim()[1]))
        below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)

    return both("ratios", draw, (4.2, 4.4), (3, 2))
