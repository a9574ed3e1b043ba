"""The rows of a family as Markdown: what `tokenrl objectives NAME` says, and a picture."""

import inspect
import re

import tokenrl
from tokenrl.instruments.catalogue import FAMILIES, Entry, entries, selected
from tokenrl.instruments.catalogue.entry import PAPER, shown
from tokenrl.objectives.aggregations import AGGREGATIONS

from . import pictures, reference


def of_family(family: str) -> str:
    """A section for each row."""
    return "\n\n".join(section(entry) for entry in selected(family=family))


def section(entry: Entry) -> str:
    parts = [f"## {entry.name}", fenced("text", entry.formula)]
    parts += [f"The {title}:\n\n{fenced('text', text)}" for title, text in entry.parts.items()]
    values = ", ".join(f"`{name}` {shown(value)}" for name, value in entry.parameters.items())
    certainty = f" ({'; '.join(entry.certainty_words)})" if entry.certainty else ""
    parts.append(
        "\n".join(
            [
                f"- Parameters: {values or 'none'}",
                f"- Gradient: {escaped(entry.gradient)}",
                f"- Source: {linked(escaped(entry.source))}{certainty}",
                f"- Fed with: {escaped('; '.join(entry.feed))}",
            ]
        )
    )
    parts += [fenced("python", entry.example), picture(entry)]
    return "\n\n".join(parts)


def picture(entry: Entry) -> str:
    return f'<div class="picture">\n{pictures.of_entry(entry.table, entry.name)}\n</div>'.replace("\n\n", "\n")


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def linked(text: str) -> str:
    """With its arXiv numbers as links."""
    return PAPER.sub(r"[\g<0>](https://arxiv.org/abs/\g<0>)", text)


def escaped(text: str) -> str:
    return re.sub(r"([*_|<>\[\]])", r"\\\1", text)


def of_all(_: str) -> str:
    """Each family with its rows, as links."""
    found = {family: [entry for entry in entries() if entry.family == family] for family in FAMILIES}
    lines = [
        f"- [{FAMILIES[family]}]({page(family)}.md): "
        + ", ".join(f"[`{row.name}`]({page(family)}.md#{anchor(row.name)})" for row in rows)
        for family, rows in found.items()
    ]
    return "\n".join(lines)


def page(family: str) -> str:
    """The page of docs/objectives that shows a family."""
    return {"divergence": "distillation"}.get(family, family)


def anchor(name: str) -> str:
    return name.replace("_", "-")


def of_aggregations(_: str) -> str:
    """The table of aggregations."""
    head = ["| name | w_t, of n valid tokens in its sequence | divided by the count of |", "| --- | --- | --- |"]
    return "\n".join(head + [aggregation(name) for name in AGGREGATIONS])


def aggregation(name: str) -> str:
    mode = AGGREGATIONS[name]
    span = {
        "one": "1", "inverse_length": "1 / n", "group": "1 / tokens of its group",
        "balanced": "share of its sign in the group's rows / tokens of that sign in the group",
    }[mode.span]  # fmt: skip
    counts = {
        "tokens": "valid tokens", "rows": "sequences with a valid token", "groups": "groups with a valid token",
        "one": "nothing",
    }[mode.unit]  # fmt: skip
    return f"| `{name}` | {span} | {counts}{', times the padded width T' * mode.over_width} |"


def of_advantages(_: str) -> str:
    """The functions of tokenrl.advantages and tokenrl.rewards, each with its first sentence."""
    lines = ["| function | gives |", "| --- | --- |"]
    for module in ("advantages", "rewards"):
        for name in reference.names_of(getattr(tokenrl, module)):
            thing = getattr(getattr(tokenrl, module), name)
            text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
            kind = "class" if inspect.isclass(thing) else "func"
            lines.append(f"| {{py:{kind}}}`~tokenrl.{module}.{name}` | {escaped(text)} |")
    return "\n".join(lines)


def of_gallery(name: str) -> str:
    """A committed picture, that of the reader's scheme."""
    return "\n".join(
        f"```{{image}} pictures/gallery/{name}-{theme}.svg\n:class: only-{theme}\n:alt: {name}\n:width: 100%\n```"
        for theme in ("light", "dark")
    )
