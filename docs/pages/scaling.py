"""The picture of a loss head whose vocabulary ever more ranks share."""

import math

from .svg import Theme, framed, text

LEFT, RIGHT, TOP, BOTTOM = 44, 560, 44, 300
LEAST, MOST = 5.0, 500.0  # milliseconds
NODE = 8
DASHES = {32000: "", 151936: "2 3", 262144: "9 3 2 3"}  # of the vocabularies that are shown


def at(ranks: float, ms: float, most: int) -> tuple[float, float]:
    """Of the picture, both scales logarithmic."""
    x = LEFT + (RIGHT - LEFT) * math.log2(ranks) / math.log2(most)
    return x, BOTTOM - (BOTTOM - TOP) * math.log(ms / LEAST) / math.log(MOST / LEAST)


def ranks(theme: Theme, report: dict) -> str:
    """A line for each vocabulary, full where another doubling pays; a ring at the last of them."""
    heads = report["heads"]
    most = max(x["ranks"] for x in heads)
    title = f"Loss head of {report['tokens']:,} tokens, width {report['hidden']:,}, milliseconds (a model)"
    parts = [text(0, 20, title, theme.muted), *_grid(theme, most)]
    for vocab, dash in DASHES.items():
        line = [x for x in heads if x["vocab"] == vocab]
        paying = [x for x in line if x["pays"]]
        parts.append(_curve(line, most, theme.other, dash))
        parts.append(_curve(paying, most, theme.ours, dash))
        x, y = at(paying[-1]["ranks"], 1e3 * paying[-1]["seconds"], most)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='{theme.box}' stroke='{theme.ours}'/>")
        x, y = at(1, 1e3 * line[0]["seconds"], most)
        parts.append(text(x + 6, y - 5, f"{vocab:,}", theme.ink, 12))
    return framed(640, 344, "Time of the loss head by ranks of the vocabulary, and where more stop paying", parts)


def _curve(line: list[dict], most: int, colour: str, dash: str) -> str:
    points = " ".join("{:.1f},{:.1f}".format(*at(x["ranks"], 1e3 * x["seconds"], most)) for x in line)
    dashes = f"stroke-dasharray='{dash}'" if dash else ""
    return f"<polyline points='{points}' fill='none' stroke='{colour}' stroke-width='2' {dashes}/>"


def _grid(theme: Theme, most: int) -> list[str]:
    parts = []
    for ms in (5, 10, 20, 50, 100, 200, 500):
        _, y = at(1, ms, most)
        parts.append(f"<path d='M{LEFT} {y:.1f} L{RIGHT} {y:.1f}' stroke='{theme.line}'/>")
        parts.append(text(LEFT - 8, y + 4, f"{ms}", theme.muted, 12, "text-anchor='end'"))
    for count in (2**k for k in range(int(math.log2(most)) + 1)):
        x, _ = at(count, LEAST, most)
        parts.append(text(x, BOTTOM + 18, f"{count:,}", theme.muted, 12, "text-anchor='middle'"))
    x, _ = at(NODE, LEAST, most)
    parts.append(f"<path d='M{x:.1f} {TOP} L{x:.1f} {BOTTOM}' stroke='{theme.muted}' stroke-dasharray='3 3'/>")
    parts.append(text(x + 6, TOP + 12, "one node | several", theme.muted, 12))
    said = "ranks of the vocabulary; grey: another doubling takes less than a quarter off"
    return [*parts, text(LEFT, BOTTOM + 38, said, theme.muted, 12)]
