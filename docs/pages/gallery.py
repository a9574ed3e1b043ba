"""The pictures of docs/gallery.md, light and dark, made anew by the package's own commands on this machine:
`PYTHONPATH=.:docs python -m pages.gallery [NAME ...]`; the demo takes its minute.

What a command prints is exported by rich, what it draws by matplotlib; the colours of either scheme are put in for
those of the figure, and nothing is fetched from elsewhere.
"""

import io
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from torch import Tensor

import tokenrl
from bench import recorded_report
from tokenrl.instruments.inspection import picture
from tokenrl.instruments.inspection.numbers import inspected
from tokenrl.instruments.parity import random_batch, report, shown
from tokenrl.instruments.parity.user_loss import user_loss
from tokenrl.instruments.plan import report as plans
from tokenrl.instruments.plan.model_config import shape_of
from tokenrl.instruments.plan.world import World
from tokenrl.instruments.profiling import figures

from .drawn import PICTURES
from .svg import FONT, THEMES, Theme

matplotlib.use("agg")

GALLERY = PICTURES / "gallery"
WIDTH = 100  # of a terminal
ANSI = {
    "light": [(36, 41, 47), (207, 34, 46), (17, 99, 41), (121, 78, 0), (9, 105, 218), (130, 80, 223), (27, 124, 131)],
    "dark": [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34), (88, 166, 255), (188, 140, 255),
             (57, 197, 207)],
}  # fmt: skip
# What the figures of commands are drawn with, by what it is of a theme; what else there is stays as it is in both.
DRAWN_WITH = {
    "ink": ("#333333", "#000000", "#262626"), "line": ("#e6e6e6", "#cccccc", "#b0b0b0"), "box": ("#ffffff",),
}  # fmt: skip
SERIES = {
    "light": {"#c2571a": "#c2571a", "#1f6f8b": "#1f6f8b", "#7a3b8f": "#7a3b8f"},
    "dark": {"#c2571a": "#f0883e", "#1f6f8b": "#4fb3d4", "#7a3b8f": "#c48be0"},
}
Pair = dict[str, str]  # theme -> SVG


def as_rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def said(title: str, tell: Callable[[Console], Any]) -> Pair:
    """What a command tells a terminal."""
    found = {}
    for name, theme in THEMES.items():
        console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, legacy_windows=False)
        tell(console)
        ansi = [*ANSI[name], as_rgb(theme.muted)]
        colours = TerminalTheme(as_rgb(theme.box), as_rgb(theme.ink), ansi, ansi)
        text = console.export_svg(title=title, theme=colours, unique_id=re.sub(r"\W+", "-", title))
        text = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", text, flags=re.S)
        found[name] = text.replace("Fira Code, monospace", "ui-monospace, SFMono-Regular, Menlo, monospace")
    return found


def drawn(text: str) -> Pair:
    """A figure of matplotlib, made for a white page."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    return {name: recoloured(text, theme, SERIES[name]) for name, theme in THEMES.items()}


def recoloured(text: str, theme: Theme, series: Mapping[str, str]) -> str:
    new = {old: getattr(theme, name) for name, colours in DRAWN_WITH.items() for old in colours} | dict(series)
    text = re.sub("|".join(new), lambda found: new[found[0]], text)
    # Text of matplotlib has the colour of SVG, black, unless it says so.
    return text.replace("<svg ", f"<svg fill='{theme.ink}' {FONT} ", 1)


def inlined(pictures: Mapping[str, str], place: str) -> Pair:
    """A figure of the page of a profile, whose colours are names."""
    shades = ("#3b6fb6", "#d98032", "#3f8f5f", "#a8588f", "#7a6fc2", "#b0892f", "#4d97a8", "#b5564f")
    found = {}
    for name, theme in THEMES.items():
        named = {"ink": theme.ink, "muted": theme.muted, "grid": theme.line, "paper": theme.box}
        named |= {f"series-{i}": shade for i, shade in enumerate(shades)}
        text = re.sub(r"var\(--([\w-]+)\)", lambda colour, named=named: named[colour[1]], pictures[place])
        head = f"<svg xmlns='http://www.w3.org/2000/svg' {FONT} fill='{theme.ink}' "
        found[name] = text.replace("<svg ", head, 1)
    return found


def rollouts(folder: Path) -> Path:
    """Of the demo; it is run once."""
    path = folder / "rollouts.safetensors"
    if not path.exists():
        from tokenrl import demo
        from tokenrl.demo import plots

        result = demo.run(folder, demo.Settings(), Console(stderr=True))
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenrl"}):
            plots.curves(result, folder / "curves.svg")
    return path


def curves(folder: Path) -> dict[str, Pair]:
    rollouts(folder)
    return {"curves": drawn((folder / "curves.svg").read_text())}


def clips(folder: Path) -> dict[str, Pair]:
    batch = tokenrl.load_batch(rollouts(folder))
    with matplotlib.rc_context({"svg.hashsalt": "tokenrl"}):
        picture.draw(inspected(batch), folder / "inspect.svg")
    return {"inspect": drawn((folder / "inspect.svg").read_text())}


def recorded(folder: Path) -> Path:
    """A step from hidden states, of a size at which a machine has something to do."""
    g, (rows, width, hidden, vocab) = torch.Generator().manual_seed(0), (8, 128, 256, 32_000)
    states, weight = torch.randn(rows, width, hidden, generator=g), torch.randn(vocab, hidden, generator=g) / 16
    ids = torch.randint(0, vocab, (rows, width), generator=g)
    old = tokenrl.linear_token_logprobs(states, weight, ids, outputs=["logp"]).logp
    old = old + 0.15 * torch.randn(rows, width, generator=g)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (rows, 1), generator=g)
    path = folder / "step.safetensors"
    with tokenrl.record(path):
        given = (states.requires_grad_(), weight.requires_grad_(), ids, old, torch.randn(rows, generator=g))
        tokenrl.linear_policy_loss("ctpo", *given, mask=mask)
    return path


def profile(folder: Path) -> dict[str, Pair]:
    found = recorded_report.made(recorded(folder), None, None, "cpu", 5, False)
    assert found.profile is not None
    told = said(
        "tokenrl profile step.safetensors --no-compile --repeats 5",
        lambda console: recorded_report.show(found, console),
    )
    roofline = figures.roofline(found.profile.lines, found.profile.machine)
    return {"profile": told, "roofline": inlined(roofline, "desk")}


def exclusive(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """A CTPO whose prefixes leave out the token itself."""
    x = (logp - old_logp) * mask
    t, a = mask.cumsum(-1).clamp(min=1) ** 0.5, advantages[:, None]
    s = (x.cumsum(-1) - x).detach() + logp - logp.detach()
    loss = torch.max(-a * s.exp(), -a * torch.clamp(s, -0.025 * t, 0.05 * t).exp())
    loss = torch.where(a < 0, torch.min(loss, -a * torch.exp(0.05 * t)), loss)
    return ((loss * mask).sum(-1) / mask.sum(-1)).mean()


def parity(_: Path) -> dict[str, Pair]:
    found = report.of_loss(user_loss(exclusive), random_batch(0, "ctpo"), None)
    title = "tokenrl parity batch.safetensors --against my_module:exclusive"
    return {"parity": said(title, lambda console: shown.print_report(found, console))}


def memory(_: Path) -> dict[str, Pair]:
    """Peak memory of each way, of `tokenrl plan` for an H200 and more and more tokens."""
    from matplotlib.figure import Figure

    counts, ways = [2**k for k in range(10, 19)], {}
    for tokens in counts:
        shape = shape_of(tokens, 5120, 151_936, "bf16", None)
        for row in plans.plan(shape, "h200", World(1, 1, 1, 16), None, {})["ways"]:
            ways.setdefault(row["way"], {})[tokens] = row["both_peak_bytes"] / 1e9
    out, shades = io.StringIO(), ("#c2571a", "#1f6f8b", "#7a3b8f")
    with matplotlib.rc_context({**picture.STYLE, "svg.hashsalt": "tokenrl", "axes.edgecolor": "#333333"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for i, (way, peaks) in enumerate(ways.items()):
            axes.plot(
                peaks.keys(),
                peaks.values(),
                label=way,
                color=shades[i % 3],
                linestyle=("-", "--", ":")[i // 3 % 3],
                marker="o",
            )
        axes.axhline(141, color="#333333", linewidth=0.8)
        axes.annotate("memory of an H200", (counts[0], 141), (0, 3), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel="tokens of a call", ylabel="peak GB beyond inputs")
        axes.set_xticks(counts, [f"{count:,}" for count in counts], rotation=30)
        axes.minorticks_off()
        axes.legend(fontsize=8)
        figure.savefig(out, format="svg")
    return {"memory": drawn(out.getvalue())}


MADE = {"curves": curves, "inspect": clips, "profile": profile, "parity": parity, "memory": memory}


def main(names: list[str], folder: Path) -> None:
    GALLERY.mkdir(parents=True, exist_ok=True)
    for name in names or MADE:
        for made, pair in MADE[name](folder).items():
            for theme, text in pair.items():
                (GALLERY / f"{made}-{theme}.svg").write_text(re.sub(r"[ \t]+$", "", text.strip(), flags=re.M) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(sys.argv[1:], Path(scratch))
