"""A profile as one page that needs nothing else: no network, no script."""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ...errors import wrong
from . import figures, tables
from .lines import Line

if TYPE_CHECKING:
    from ..profiler import Profile

NEEDED = ("jinja2", "matplotlib")


@dataclass(frozen=True)
class Row:
    """cells: the first names it. number, colour: as a figure marks it."""

    cells: Sequence[str]
    detail: str = ""
    level: int = 0
    number: int | None = None
    colour: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Section:
    """Of a page: what of these it has."""

    name: str
    title: str
    text: str = ""
    svgs: dict[str, Any] = field(default_factory=dict)
    head: Sequence[str] = ()
    rows: Sequence[Row] = ()
    pairs: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()


def page(profile: "Profile", title: str, before: Sequence[Section] = ()) -> str:
    """The page as HTML. before: sections that come first."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        accepted = f"{' and '.join(NEEDED)} installed (pip install tokenrl[demo])"
        raise wrong("html", f"no {' and no '.join(missing)}", accepted)
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text())
    sections = [*before, *_sections(profile)]
    for section in sections:
        section.svgs.update({name: Markup(svg) for name, svg in section.svgs.items()})
    subtitle = f"{profile.machine['name']}, torch {profile.machine['torch']}, {time.strftime('%Y-%m-%d %H:%M')}"
    return template.render(title=title, subtitle=subtitle, facts=_facts(profile), sections=sections)


def _facts(profile: "Profile") -> list[tuple[str, str]]:
    step = profile.step
    ours = sum(line.seconds for line in profile.lines if line.level == 0 and line.backend)
    whole = step.busy or step.wall
    found = [("step", f"{tables.number(1e3 * step.wall)} ms")]
    if profile.device == "cuda":
        found.append(("device at work", f"{tables.number(1e3 * step.busy)} ms"))
    found.append(("in tokenrl", f"{100 * ours / whole:.0f}%" if whole else "-"))
    found.append(("peak memory", f"{tables.number(step.total.peak / 1e6)} MB"))
    return [*found, ("host syncs" if profile.device == "cuda" else "numbers read by the host", f"{step.total.syncs}")]


def _sections(profile: "Profile") -> list[Section]:
    step, lines, ratios = profile.step, profile.lines, profile.ratios
    no_ratios = f"None: {profile.loss.reason}." if ratios is None else "None: no token takes part."
    of_ratios = (
        "" if ratios is None else f"Of {ratios.objective}, over valid tokens; the ratio is the objective's own, e^s."
    )
    roof = (
        "Each op by its number in the table, under what this machine does at best. An operation is a flop of a matrix "
        "product, else an exponential, else a number."
    )
    found = [
        _ops(profile),
        Section("roofline", "Roofline", roof, figures.roofline(lines, profile.machine)),
        Section(
            "timeline", "Timeline", "Ranges of the ops over the step; pale: backward.", figures.timeline(step, lines)
        ),
        Section("memory", "Memory", "Bytes held, by allocations and releases.", figures.memory(step, lines)),
        Section("ratios", "Ratios and clips by position", of_ratios, figures.ratios(ratios)),
        _machine(profile),
    ]
    if not found[4].svgs:
        found[4] = Section("ratios", found[4].title, no_ratios)
    if profile.kernels:
        found.insert(1, _kernels(profile.kernels))
    return found


def _ops(profile: "Profile") -> Section:
    on_gpu = profile.device == "cuda"
    head = [
        "op",
        "calls",
        "launches",
        "host ms",
        *["device ms"] * on_gpu,
        "GB/s",
        "TFLOP/s",
        "of limit",
        "peak MB",
        "syncs",
    ]
    named = figures.colours(profile.lines)
    marked = {point.number for point in figures.points(profile.lines)}
    rows = [_row(number, line, named, number in marked, on_gpu) for number, line in enumerate(profile.lines, 1)]
    others = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in profile.step.others.most_common(tables.OTHERS))
    return Section("ops", "Ops", head=head, rows=rows, notes=[f"Of all else most in {others}."] if others else [])


def _row(number: int, line: Line, named: dict[str, str], marked: bool, on_gpu: bool) -> Row:
    name, counts, times, rates, (share, limit), (peak, syncs) = tables.cells(line)
    cells = [line.what, *counts, times[0], *[times[1]] * on_gpu, *rates, f"{share} {limit}".strip(), peak, syncs]
    colour = figures.NAMES[named.get(line.what.split()[0], figures.MUTED)]
    detail = tables.dimmed(line.shape, line.dtype, line.backend)
    return Row(cells, detail, line.level, number if marked else None, f"var(--{colour})", bool(line.backend))


def _kernels(attributes: Sequence[dict[str, Any]]) -> Section:
    names = {
        "name": "kernel", "threads": "threads", "registers": "registers", "shared_bytes": "shared bytes",
        "local_bytes": "local bytes", "blocks_per_multiprocessor": "blocks per multiprocessor",
    }  # fmt: skip
    rows = [Row([str(row[name]) for name in names]) for row in attributes]
    return Section("kernels", "CUDA kernels", head=list(names.values()), rows=rows)


def _machine(profile: "Profile") -> Section:
    shown = {
        "read": lambda x: f"{x / 1e9:.1f} GB/s", "copy": lambda x: f"{x / 1e9:.1f} GB/s, read plus written",
        "exponentials": lambda x: f"{x / 1e9:.2f} G per second",
    }  # fmt: skip
    pairs = [(name.replace("_", " "), shown.get(name, str)(value)) for name, value in profile.machine.items()]
    return Section("machine", "Machine", pairs=pairs)
