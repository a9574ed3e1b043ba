"""What a row does to one token, one pair or one vocabulary: its loss, and below it the gradient, drawn from the row."""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import torch
from torch import Tensor

from tokenrl.instruments.profiling.figures import GRID, INK, MUTED, SERIES, inlined
from tokenrl.objectives.distillation import DISTILLATIONS
from tokenrl.objectives.divergences import DIVERGENCES
from tokenrl.objectives.gates.base import Gate
from tokenrl.objectives.links import OfLabels
from tokenrl.objectives.policy import OBJECTIVES
from tokenrl.objectives.preference import PREFERENCES
from tokenrl.objectives.unlearning import UNLEARNINGS

POSITION, OLD_PROBABILITY = 4.0, 0.3  # of the token that is drawn
POINTS = 81


class Curve(NamedTuple):
    """value and slope: what is drawn above and below."""

    label: str
    value: Tensor
    slope: Tensor


class Picture(NamedTuple):
    """Curves over x; title: what is drawn; axes: of x, of the values and of the slopes."""

    x: Tensor
    curves: Sequence[Curve]
    axes: tuple[str, str, str]


def of_entry(table: str, name: str) -> str:
    """A row's picture as SVG."""
    return svg(name, PICTURES[table](name))


def of_objective(name: str) -> Picture:
    gate = OBJECTIVES[name].gate
    s = spread(gate)
    curves = []
    for sign, label in ((1.0, "A = 1"), (-1.0, "A = -1")):
        u = s.clone().requires_grad_()
        logp = u + torch.tensor(OLD_PROBABILITY).log()
        advantages, t = torch.full_like(s, sign), torch.full_like(s, POSITION)
        value = gate.value(u, u, logp, advantages, t)
        (slope,) = torch.autograd.grad(value.sum(), u)
        curves.append(Curve(label, value.detach(), slope))
    if not gate.uses_advantages:
        curves = [curves[0]._replace(label="")]
    return Picture(s.exp(), curves, ("ratio r", "loss", "dl / dlogp"))


def spread(gate: Gate) -> Tensor:
    """Log ratios to draw a gate over: as far as four times its widest bound, and to 2 where it has none."""
    bounds = [getattr(gate, name) for name in gate.names if name.startswith("eps")]
    widths = [abs(bound) for bound in bounds if isinstance(bound, float) and 0 < bound < 100]
    wide = min(4 * max(widths), 8.0) if widths else 1.0
    return torch.linspace(max(1 - wide, 0.02), 1 + wide, POINTS, dtype=torch.float64).log()


def of_preference(name: str) -> Picture:
    row = PREFERENCES[name]
    if isinstance(row.link, OfLabels):
        return _of_labels(row.link)
    wide = 2.8 if row.reference == "none" and row.statistic == "mean" else 3 / row.link.beta
    d = torch.linspace(-wide, wide, POINTS, dtype=torch.float64)
    (won, won_slope), (lost, lost_slope) = (row.score.of(side * d / 2 - 1.5) for side in (1, -1))
    value, chosen, rejected = row.link.of(won, lost)
    curves = [Curve("chosen", value, chosen * won_slope), Curve("rejected", value, rejected * lost_slope)]
    return Picture(d, curves, ("margin x_w - x_l", "loss", "dl / dx"))


def _of_labels(link: OfLabels) -> Picture:
    x = torch.linspace(-5, 5, POINTS, dtype=torch.float64) / link.beta
    curves = [
        Curve(label, *link.of_labelled(x, torch.full_like(x, good, dtype=torch.bool), torch.zeros_like(x)))
        for good, label in ((True, "desirable"), (False, "not"))
    ]
    return Picture(x, curves, ("score x", "loss", "dl / dx"))


def of_unlearning(name: str) -> Picture:
    x = torch.linspace(-6, -0.02, POINTS, dtype=torch.float64)
    return Picture(x, [Curve("", *UNLEARNINGS[name].term.of(x))], ("x of the tokens to forget", "loss", "dl / dx"))


def of_distillation(name: str) -> Picture:
    return of_divergence(DISTILLATIONS[name].divergence)


def of_divergence(kind: Any) -> Picture:
    """Over a vocabulary of two entries, of which the teacher gives the first 0.7."""
    row = DIVERGENCES[kind]() if isinstance(kind, str) else kind
    first = torch.linspace(0.01, 0.99, POINTS, dtype=torch.float64)
    z = (first / (1 - first)).log().requires_grad_()
    log_p = torch.stack([z, torch.zeros_like(z)], -1).log_softmax(-1)
    value = row.terms(log_p, torch.tensor([0.7, 0.3], dtype=torch.float64).log().expand(POINTS, 2)).sum(-1)
    (slope,) = torch.autograd.grad(value.sum(), z)
    return Picture(first, [Curve("", value.detach(), slope)], ("p of the entry that r gives 0.7", "D", "dD / dz"))


PICTURES: dict[str, Callable[[str], Picture]] = {
    "policy": of_objective, "preference": of_preference, "unlearning": of_unlearning,
    "distillation": of_distillation, "divergence": of_divergence,
}  # fmt: skip
STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tokenrl", "font.size": 9, "axes.edgecolor": MUTED, "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.linewidth": 0.6, "legend.frameon": False, "legend.labelcolor": INK,
    "axes.facecolor": "none", "figure.facecolor": "none",
}  # fmt: skip
METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@functools.cache
def _canvas() -> Any:
    """One figure for all pictures: to make one costs more than to draw it."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9, 3.3))
        figure.subplots(2, 1, sharex=True)
        figure.subplots_adjust(left=0.14, right=0.97, top=0.9, bottom=0.14, hspace=0.16)
    for axes in figure.axes:
        axes.locator_params(nbins=4)
        axes.ticklabel_format(useOffset=False)
    return figure


def svg(name: str, picture: Picture) -> str:
    """Rows of one gate have one drawing, under ids of their own."""
    numbers = tuple(x.numpy().tobytes() for x in (picture.x, *(x for curve in picture.curves for x in curve[1:])))
    if numbers not in _DRAWN:
        _DRAWN[numbers] = _drawn(picture)
    return inlined(_DRAWN[numbers], name)


_DRAWN: dict[tuple[bytes, ...], str] = {}


def _drawn(picture: Picture) -> str:
    figure = _canvas()
    upper, lower = figure.axes
    for axes in figure.axes:
        while axes.lines:
            axes.lines[0].remove()
    for curve, colour in zip(picture.curves, SERIES, strict=False):
        upper.plot(picture.x, curve.value, color=colour, label=curve.label)
        lower.plot(picture.x, curve.slope, color=colour)
    of_x, of_value, of_slope = picture.axes
    lower.set(xlabel=of_x, ylabel=of_slope)
    upper.set_ylabel(of_value)
    for axes in figure.axes:
        axes.relim()
        axes.autoscale_view()
    figure.subplots_adjust(top=0.9 if len(picture.curves) <= 2 else 0.84)  # two rows of a legend
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        if len(picture.curves) > 1:
            upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
        figure.savefig(out, format="svg", metadata=METADATA)
    if legend := upper.get_legend():
        legend.remove()
    return out.getvalue()
