"""The picture of `tokenrl inspect`: ratios and clips by position, lengths, and what each objective clips."""

import math
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from ...batch.spans import spans_of
from ...errors import unknown, wrong
from .numbers import CLIPS, QUANTILES, Inspected, clipped_tokens, even_bins, longest, quantiles
from .report import clips

KINDS = (".png", ".svg", ".pdf")
BINS = 64  # of positions
COLORS = {"clip_low": "#c2571a", "clip_high": "#1f6f8b", "clip_dual": "#7a3b8f"}
INK, GRID = "#333333", "#e6e6e6"
STYLE: dict[str, Any] = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False,
    "svg.fonttype": "none",
}  # fmt: skip


def check_picture(path: Path) -> None:
    """ValueError where such a file cannot be drawn."""
    if path.suffix not in KINDS:
        raise unknown("out", path.suffix or path.name, KINDS)
    try:
        import matplotlib
    except ImportError:
        raise wrong("out", f"{path}, without matplotlib", "a machine with it (pip install tokenrl[demo])") from None
    matplotlib.use("agg")


def draw(found: Inspected, path: Path, backend: str | None = None) -> None:
    """Writes the picture."""
    check_picture(path)
    from matplotlib import pyplot

    bins = even_bins(longest(found.position), BINS)
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
        _ratios(axes[0, 0], found, bins)
        _clips(axes[0, 1], found, bins, backend)
        _lengths(axes[1, 0], found)
        _objectives(axes[1, 1], found.numbers["objectives"])
        for axis in axes.flat if not bins else ():
            axis.set(xticks=[], yticks=[])
            _say(axis, "no valid token")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _middle(rows: list[dict[str, Any]]) -> list[float]:
    return [(row["from"] + row["to"]) / 2 for row in rows]


def _ratios(axis: Any, found: Inspected, bins: list[tuple[int, int]]) -> None:
    rows = quantiles(found.log_ratio.exp(), found.position, bins)
    at = _middle(rows)
    levels = [[row["quantiles"][k] for row in rows] for k in range(len(QUANTILES))]
    for k, alpha in ((0, 0.18), (1, 0.4)):
        share = f"{QUANTILES[-1 - k] - QUANTILES[k]:.0%} of tokens"
        axis.fill_between(at, levels[k], levels[-1 - k], color="#1f6f8b", alpha=alpha, linewidth=0, label=share)
    axis.plot(at, levels[len(QUANTILES) // 2], color=INK, linewidth=1.4, label="median")
    axis.set(title="Ratio of a token, new / old", xlabel="position among valid tokens", ylabel="ratio")
    _legend(axis, rows)


def _clips(axis: Any, found: Inspected, bins: list[tuple[int, int]], backend: str | None) -> None:
    """Of the recorded objective, by its bounds."""
    axis.set(title=f"Clipped by {found.batch.objective.name}", xlabel="position among valid tokens", ylabel="tokens, %")
    own = found.numbers["objectives"][0]
    if "reason" in own or own["clipped"] is None:
        why = own.get("reason", "its clips are known of the whole batch alone")
        _say(axis, why)
        return
    metrics = clipped_tokens(found.batch.objective, found.batch, found.logp, backend)
    for name in CLIPS:
        rows = shares(getattr(metrics, name).reshape(-1), found.position, bins)
        if any(row["share"] for row in rows):
            axis.plot(_middle(rows), [100 * row["share"] for row in rows], color=COLORS[name], label=name[5:])
    axis.set_ylim(bottom=0)
    _legend(axis, axis.get_lines())


def _say(axis: Any, words: str) -> None:
    axis.text(0.5, 0.5, words, ha="center", va="center", wrap=True, transform=axis.transAxes)


def shares(hit: Tensor, position: Tensor, bins: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What part of the tokens of each bin is hit."""
    counts, hits = (
        position.new_zeros(longest(position) + 1).index_add_(0, position, x.long()).cumsum(0)
        for x in (position > 0, hit & (position > 0))
    )
    found = []
    for first, last in bins:
        tokens = int(counts[last] - counts[first - 1])
        if tokens:
            found.append({"from": first, "to": last, "share": int(hits[last] - hits[first - 1]) / tokens})
    return found


def _lengths(axis: Any, found: Inspected) -> None:
    lengths = spans_of("sequence", found.batch.layout).counts().numpy()
    axis.set(title="Lengths", xlabel="valid tokens of a sequence", ylabel="sequences")
    if lengths.any():
        bins = min(40, max(1, math.ceil(lengths.size**0.5) * 2))
        width = math.ceil((lengths.max() - lengths.min() + 1) / bins)  # of whole tokens, else some bins hold none
        edges = numpy.arange(lengths.min(), lengths.max() + width + 1, width) - 0.5
        axis.hist(lengths, bins=edges, color="#1f6f8b")


def _objectives(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Those that clip, by what they clip."""
    clipped = {row["name"]: row for row in rows if clips(row)}
    names = sorted(clipped, key=lambda name: sum(clipped[name][clip] for clip in CLIPS))
    start = [0.0] * len(names)
    for clip in CLIPS:
        widths = [100 * clipped[name][clip] for name in names]
        axis.barh(names, widths, left=start, color=COLORS[clip], label=clip[5:])
        start = [a + b for a, b in zip(start, widths, strict=True)]
    axis.tick_params(axis="y", labelsize=max(4, min(8, 200 // max(len(names), 1))))
    axis.set(title="Clipped by each objective that clips here", xlabel="tokens, %")
    _legend(axis, names)


def _legend(axis: Any, drawn: Any) -> None:
    if len(drawn):
        axis.legend(loc="best", fontsize=8)
