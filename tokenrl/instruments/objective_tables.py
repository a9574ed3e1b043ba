"""What the tables of objectives say about themselves: `tokenrl objectives`, and README's tables, which
`python -m tokenrl.instruments.objective_tables README.md` writes there."""

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from torch import Tensor

from ..objectives.forms.base import Form
from ..objectives.gates.base import INF, Gate
from ..objectives.links import Link
from ..objectives.policy import CERTAINTY, OBJECTIVES, Objective, objective
from ..objectives.preference import PREFERENCES, Preference
from ..objectives.scores import Score
from ..objectives.statistics import STATISTICS
from ..objectives.unlearning import COEFS, UNLEARNINGS, Forget
from ..ops.backends import BACKENDS, PACKAGED

FLOWS = {
    "through": "the true derivative, through the statistic to every token of the ratio",
    "local": "stopped in all tokens but the own one: ds_t / dlogp_t = 1, no other",
}


def parameters(row: Objective) -> dict[str, object]:
    """Name -> value of the parameters of the row's parts, and of clamp and cap where they are not the usual ones."""
    found = {name: getattr(part, name) for part in row.parts.values() for name in part.names}
    if row.cap != INF:
        found["cap"] = row.cap
    if row.clamp != 20:
        found["clamp"] = row.clamp
    return found


def kernels(row: Objective) -> list[str]:
    """The backends whose kernels know the row's gate."""
    return [name for name in PACKAGED if BACKENDS[name].why_not_gate(row.gate.name) is None]


def certainty(row: Objective) -> str:
    return f"[{row.certainty}]" if row.certainty else ""


def text_of(part: Gate | Form) -> str:
    """The docstring of a gate or form, with those it refers to."""
    lines = [inspect.cleandoc(cls.__doc__) for cls in type(part).__mro__ if cls.__doc__ and cls not in _BASES]
    return "\n\n".join(lines)


_BASES = {Gate, Form, *Gate.__mro__, *Form.__mro__}


def shown(value: object) -> str:
    return "one per token" if isinstance(value, Tensor) else f"{value}"


def formula(row: Objective) -> str:
    """The row from log ratio to loss, one step a line."""
    statistic = inspect.cleandoc(STATISTICS[row.statistic].__doc__ or "")
    clamped = "" if row.clamp == INF else f", clamped to +-{row.clamp:g}"
    capped = "" if row.cap == INF else f", at most {row.cap:g}"
    steps = [
        f"x_t = logp_t - old_logp_t{clamped}",
        f"{statistic.splitlines()[0].rstrip('.')}{capped}",
        f"l_t = {row.gate.name}(s_t, x_t, logp_t, A_t, t)",
        f"L = sum_t w_t l_t, w of {row.aggregation!r}",
    ]
    if row.form is not None:
        steps.insert(0, f"around it the form {type(row.form).__name__}, below")
    return "\n".join(steps)


def objectives_table() -> str:
    """Markdown, one line per row of OBJECTIVES."""
    columns = "name statistic flow gate form parameters aggregation source certainty backends".split()
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns)]
    for row in OBJECTIVES.values():
        form = "" if row.form is None else type(row.form).__name__
        given = ", ".join(f"{name}={shown(value)}" for name, value in parameters(row).items())
        lines.append(
            (f"`{row.name}`", row.statistic, row.flow, row.gate.name, form, given, row.aggregation, row.source,
             certainty(row), ", ".join(kernels(row)))
        )  # fmt: skip
    return markdown(lines)


def preferences_table() -> str:
    """Markdown, one line per row of PREFERENCES."""
    columns = ("name", "link", "statistic", "reference", "parameters", "source", "certainty")
    return markdown([columns, ("---",) * len(columns), *map(_preference_cells, PREFERENCES.values())])


def _preference_cells(row: Preference) -> Sequence[str]:
    values = {name: getattr(part, name) for part in row.parts.values() for name in part.names}
    values |= {name: getattr(row, name) for name in ("divergence", "length", "nll") if getattr(row, name)}
    link = _in_a_cell(row.link)
    if type(row.score) is not Score:
        link = f"{link}, of scores {_in_a_cell(row.score)}"
    if row.coupling not in ("pairs", "labels"):
        link = f"{link}, {row.coupling}"
    if row.divergence_flow != "both":
        link = f"{link}, divergence of the {row.divergence_flow} alone"
    given = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"`{row.name}`", link, row.statistic, row.reference, given, row.source, f"[{row.certainty}]"


def unlearnings_table() -> str:
    """Markdown, one line per row of UNLEARNINGS."""
    columns = ("name", "forget term", "statistic", "reference", "parameters", "source", "certainty")
    lines: list[Sequence[str]] = [columns, ("---",) * len(columns)]
    for row in UNLEARNINGS.values():
        values = {name: getattr(row.term, name) for name in row.term.names}
        values |= {name: getattr(row, name) for name in COEFS if getattr(row, name)}
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        cells = (f"`{row.name}`", _in_a_cell(row.term), row.statistic, row.reference, given, row.source)
        lines.append((*cells, f"[{row.certainty}]"))
    return markdown(lines)


def _in_a_cell(part: Link | Score | Forget) -> str:
    """The docstring of a link, score or forget term."""
    return " ".join(inspect.cleandoc(type(part).__doc__ or "").rstrip(".").split()).replace("|", r"\|")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def certainty_of(row: Objective) -> list[str]:
    """What its letters say."""
    return [f"[{letter}] {CERTAINTY[letter]}" for letter in row.certainty]


def described(row: Objective) -> dict[str, object]:
    """As JSON has it."""
    form = None if row.form is None else type(row.form).__name__
    return {
        "name": row.name, "statistic": row.statistic, "flow": row.flow, "gate": row.gate.name, "form": form,
        "parameters": parameters(row), "aggregation": row.aggregation, "source": row.source,
        "certainty": [CERTAINTY[letter] for letter in row.certainty], "backends": kernels(row),
    }  # fmt: skip


def print_objectives(console: Console) -> None:
    """Each row by its name, statistic, flow and gate; below, its aggregation, form and source."""
    rows = OBJECTIVES.values()
    names, statistics, flows = (
        max(map(len, every)) for every in zip(*((r.name, r.statistic, r.flow) for r in rows), strict=True)
    )
    for row in rows:
        line = f"{row.name:<{names}}  {row.statistic:<{statistics}}  {row.flow:<{flows}}  {row.gate.name}"
        form = "" if row.form is None else f"; in the form {type(row.form).__name__}"
        console.print(line, highlight=False, markup=False)
        rest = Text(f"{row.aggregation}{form}; {row.source} {certainty(row)}")
        console.print(Padding(rest, (0, 0, 0, 4)), style="dim")


def print_objective(name: str, console: Console) -> None:
    """Formula, parameters, source and the gradient's flow of a row."""
    row = objective(name)

    def section(title: str, text: str) -> None:
        console.print(f"\n[bold]{title}[/bold]")
        console.print(
            "\n".join(f"  {line}" for line in text.splitlines()), highlight=False, markup=False, soft_wrap=True
        )

    section(row.name, formula(row))
    for title, part in row.parts.items():
        section(f"{title} {part.name if isinstance(part, Gate) else type(part).__name__}", text_of(part))
    values = parameters(row).items()
    section("parameters", "\n".join(f"{key} = {shown(value)}" for key, value in values) or "none")
    section("gradient", f"flow {row.flow!r}: {FLOWS[row.flow]}")
    section("source", "\n".join([row.source, *certainty_of(row)]))
    section("runs on", ", ".join(kernels(row)))


TABLES = {  # of README, between comments of that name
    "objectives": objectives_table, "preferences": preferences_table, "unlearnings": unlearnings_table,
}  # fmt: skip

if __name__ == "__main__":
    path = Path(sys.argv[1])
    text = path.read_text()
    for name, table in TABLES.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        text = text.split(first)[0] + first + table() + last + text.split(last)[1]
    path.write_text(text)
