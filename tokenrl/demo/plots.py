"""The demo's figure: reward curves, clip rate by position, and the log ratios beside the bands that clip them."""

import typing
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import tokenrl

if typing.TYPE_CHECKING:
    from .report import Result, Trained

COLORS = {"grpo": "#c2571a", "ctpo": "#1f6f8b"}
INK, GRID = "#333333", "#e6e6e6"
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip
FEWEST = 200
RANGE = 0.5


def curves(result: "Result", path: Path) -> Path:
    """Draws the four panels to a PNG."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        _rewards(axes[0, 0], result)
        _clip_rates(axes[0, 1], result)
        _band(axes[1, 0], result, "grpo", "Fixed band (grpo): log ratio of each token")
        _band(axes[1, 1], result, "ctpo", "Adaptive band (ctpo): prefix sum of log ratios")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _smooth(values: list[float], weight: float = 0.7) -> list[float]:
    """An exponential average, corrected for its start."""
    average, total, out = 0.0, 0.0, []
    for value in values:
        average, total = weight * average + (1 - weight) * value, weight * total + 1 - weight
        out.append(average / total)
    return out


def _rewards(axis: Axes, result: "Result") -> None:
    for name, run in result.trained.items():
        steps = range(1, len(run.history.rewards) + 1)
        axis.plot(steps, run.history.rewards, color=COLORS[name], alpha=0.25, linewidth=1)
        axis.plot(steps, _smooth(run.history.rewards), color=COLORS[name], linewidth=2.2, label=name)
        start = run.before["sampled"]
    axis.axhline(start, color=INK, linewidth=1, linestyle=":", label="warm start (held out)")
    axis.set(title="Reward while training", xlabel="step", ylabel="mean reward of the rollouts", ylim=(0, 1))
    axis.legend(loc="upper left")


def _positions(run: "Trained") -> tuple[Tensor, Tensor, Tensor]:
    """(positions, log ratios [tokens of the run, positions], clip rate) of the positions that enough tokens reached."""
    s, clipped = torch.cat(run.history.statistics), torch.cat(run.history.clipped)
    reached = (~s.isnan()).sum(0)
    enough = reached >= min(FEWEST, int(reached.max()))
    positions = torch.arange(1, s.shape[1] + 1)[enough]
    return positions, s[:, enough], (clipped.sum(0) / reached.clamp(min=1))[enough]


def _clip_rates(axis: Axes, result: "Result") -> None:
    for name, run in result.trained.items():
        positions, _, rate = _positions(run)
        axis.plot(positions, 100 * rate, color=COLORS[name], linewidth=2.2, marker="o", markersize=4, label=name)
    axis.set(title="Clip rate by token position", xlabel="position in the response", ylabel="tokens clipped, %")
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")


def _band(axis: Axes, result: "Result", name: str, title: str) -> None:
    """Quantiles of the objective's log ratio against its clip bounds."""
    positions, s, _ = _positions(result.trained[name])
    gate: Any = tokenrl.objective(name).gate
    color = COLORS[name]
    for least, most, alpha in ((0.01, 0.99, 0.18), (0.1, 0.9, 0.4)):
        edges = s.nanquantile(torch.tensor([least, most]), 0)
        share = f"{most - least:.0%} of tokens"
        axis.fill_between(positions, *edges, color=color, alpha=alpha, linewidth=0, label=share)
    if name == "grpo":
        low, high = (torch.full(positions.shape, edge).log1p() for edge in (-gate.eps_low, gate.eps_high))
    else:
        low, high = -gate.eps_low * positions**gate.power, gate.eps_high * positions**gate.power
    axis.plot(positions, high, color=INK, linewidth=1.6, label="clip bounds")
    axis.plot(positions, low, color=INK, linewidth=1.6)
    axis.axhline(0, color=INK, linewidth=0.6)
    axis.set(title=title, xlabel="position in the response", ylabel="log ratio", ylim=(-RANGE, RANGE))
    axis.legend(loc="lower left", ncols=3, fontsize=9, frameon=True, framealpha=0.85, edgecolor="none")
