"""The committed pictures of docs/pictures, light and dark: `PYTHONPATH=.:docs python -m pages.drawn` writes them.

headline: what bench/results/cpu.json measured in one run. flow: what goes into a loss. ranks: a vocabulary on ever more
of them, as bench/results/ranks.json has it.
"""

import json
from pathlib import Path

from .scaling import ranks
from .svg import THEMES, Theme, bar, framed, text

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
# What is shown of the results: op, variant and dtype of a line, and what it is to a reader.
SHOWN = (
    ("token_logprobs", "", "log-probs and entropy from logits"),
    ("linear_policy_loss", "all active", "loss from hidden states"),
    ("linear_policy_loss", "half masked", "the same, half of the tokens masked"),
)
RIVALS = {"TRL": "TRL", "Liger": "Liger", "eager": "eager PyTorch", "compile": "torch.compile"}


def measured(report: dict) -> list[tuple[str, dict[str, float]]]:
    """For what is shown, milliseconds of forward and backward by who computed it, ours first."""
    found = []
    for op, variant, title in SHOWN:
        line = next(x for x in report["lines"] if x["ours"] and (x["op"], x["variant"]) == (op, variant))
        times = {"tokenrl": line["both_ms"]}
        others = {RIVALS[name]: pair[1] * line["both_ms"] for name, pair in line["versus"].items() if pair and pair[1]}
        found.append((f"{title}, {shape(line)}", times | dict(sorted(others.items(), key=lambda item: item[1]))))
    return found


def shape(line: dict) -> str:
    return f"{' x '.join(f'{size:,}' for size in line['shape'])}, {line['dtype'].replace('bfloat', 'bf')}"


def headline(theme: Theme, report: dict) -> str:
    """Bars of each case's times, on a scale of its own."""
    left, room, parts, y = 112, 400, [], 20
    parts.append(text(0, y, "Forward and backward, milliseconds on two CPU cores, shorter is better", theme.muted))
    for title, times in measured(report):
        y += 34
        parts.append(text(0, y, title, theme.ink, 15, "font-weight='600'"))
        longest = max(times.values())
        for name, ms in times.items():
            y += 23
            width, ours = max(room * ms / longest, 2), name == "tokenrl"
            parts.append(text(left - 10, y, name, theme.ink if ours else theme.muted, 14, "text-anchor='end'"))
            parts.append(bar(left, y - 12, width, theme.ours if ours else theme.other))
            said = f"{ms:,.0f}" if ours else f"{ms:,.0f}  ({ms / times['tokenrl']:.1f}x)"
            parts.append(text(left + width + 8, y, said, theme.ink if ours else theme.muted))
    return framed(640, y + 14, "Time of tokenrl beside eager PyTorch, torch.compile, TRL and Liger", parts)


def box(x: int, y: int, width: int, said: str, theme: Theme, ours: bool = False) -> str:
    edge = theme.ours if ours else theme.line
    shown = f"<rect x='{x}' y='{y}' width='{width}' height='34' rx='5' fill='{theme.box}' stroke='{edge}'/>"
    return shown + text(x + width / 2, y + 22, said, theme.ink, 14, "text-anchor='middle'")


def arrow(x0: int, y0: int, x1: int, y1: int, theme: Theme) -> str:
    return f"<path d='M{x0} {y0} L{x1} {y1}' stroke='{theme.muted}' fill='none' marker-end='url(#tip)'/>"


def flow(theme: Theme, _: dict) -> str:
    """From what a model gives to the loss; the boxes with a coloured edge are ops."""
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{theme.muted}'/></marker></defs>"
    )
    parts = [tip, box(0, 8, 150, "hidden, lm_head", theme), box(0, 66, 150, "logits", theme)]
    parts += [box(196, 8, 196, "linear_token_logprobs", theme, True), box(196, 66, 196, "token_logprobs", theme, True)]
    parts += [box(440, 37, 192, "logp, entropy, ...", theme), box(440, 124, 192, "policy_loss", theme, True)]
    parts += [box(0, 124, 150, "rewards", theme), box(196, 124, 196, "advantages, mask, w", theme)]
    parts += [box(196, 182, 196, "linear_policy_loss", theme, True), box(440, 182, 192, "loss, metrics", theme)]
    for ends in ((150, 25, 194, 25), (150, 83, 194, 83), (392, 25, 438, 46), (392, 83, 438, 62), (536, 71, 536, 122),
                 (150, 141, 194, 141), (392, 141, 438, 141), (536, 158, 536, 180), (294, 158, 294, 180),
                 (392, 199, 438, 199)):  # fmt: skip
        parts.append(arrow(*ends, theme))
    way = f"M174 25 L174 199 L194 199' stroke='{theme.muted}' fill='none' stroke-dasharray='4 3' marker-end='url(#tip)"
    parts += [f"<path d='{way}'/>", text(0, 204, "in one pass, no logits:", theme.muted, 13)]
    return framed(640, 224, "From hidden states or logits to the loss", parts)


DRAWN = {"headline": (headline, "cpu"), "flow": (flow, "cpu"), "ranks": (ranks, "ranks")}


def all_pictures() -> dict[Path, str]:
    results = {name: json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text()) for name in ("cpu", "ranks")}
    return {
        PICTURES / f"{name}-{theme}.svg": draw(colours, results[of])
        for name, (draw, of) in DRAWN.items()
        for theme, colours in THEMES.items()
    }


if __name__ == "__main__":
    for path, picture in all_pictures().items():
        path.write_text(picture)
