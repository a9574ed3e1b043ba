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
    ("linear_policy_loss", "half masked", "the same, half of it masked"),
)
WIDTH = 486  # so little that on a phone the letters are still read
RIVALS = {"TRL": "TRL", "Liger": "Liger", "eager": "eager PyTorch", "compile": "torch.compile"}


def measured(report: dict) -> list[tuple[str, str, dict[str, float]]]:
    """For what is shown, its shape and milliseconds of forward and backward by who computed it, ours first."""
    found = []
    for op, variant, title in SHOWN:
        line = next(x for x in report["lines"] if x["ours"] and (x["op"], x["variant"]) == (op, variant))
        times = {"tokenrl": line["both_ms"]}
        others = {RIVALS[name]: pair[1] * line["both_ms"] for name, pair in line["versus"].items() if pair and pair[1]}
        found.append((title, shape(line), times | dict(sorted(others.items(), key=lambda item: item[1]))))
    return found


def shape(line: dict) -> str:
    return f"{' x '.join(f'{size:,}' for size in line['shape'])}, {line['dtype'].replace('bfloat', 'bf')}"


def headline(theme: Theme, report: dict) -> str:
    """Bars of each case's times, on a scale of its own."""
    left, room, parts, y = 116, 262, [], 20
    parts.append(text(0, y, "Forward and backward, milliseconds on two CPU cores", theme.muted))
    for title, size, times in measured(report):
        y += 34
        parts.append(text(0, y, title, theme.ink, 14, "font-weight='600'"))
        parts.append(text(WIDTH, y, size, theme.muted, 12, "text-anchor='end'"))
        longest = max(times.values())
        for name, ms in times.items():
            y += 23
            width, ours = max(room * ms / longest, 2), name == "tokenrl"
            parts.append(text(left - 10, y, name, theme.ink if ours else theme.muted, 14, "text-anchor='end'"))
            parts.append(bar(left, y - 12, width, theme.ours if ours else theme.other))
            said = f"{ms:,.0f}" if ours else f"{ms:,.0f}  ({ms / times['tokenrl']:.1f}x)"
            parts.append(text(left + width + 8, y, said, theme.ink if ours else theme.muted))
    return framed(WIDTH, y + 14, "Time of tokenrl beside eager PyTorch, torch.compile, TRL and Liger", parts)


def box(x: int, y: int, width: int, said: str, theme: Theme, ours: bool = False) -> str:
    edge = theme.ours if ours else theme.line
    shown = f"<rect x='{x}' y='{y}' width='{width}' height='34' rx='5' fill='{theme.box}' stroke='{edge}'/>"
    return shown + text(x + width / 2, y + 22, said, theme.ink, 14, "text-anchor='middle'")


def arrow(x0: int, y0: int, x1: int, y1: int, theme: Theme) -> str:
    return f"<path d='M{x0} {y0} L{x1} {y1}' stroke='{theme.muted}' fill='none' marker-end='url(#tip)'/>"


def flow(theme: Theme, _: dict) -> str:
    """From what a model gives to the loss; the boxes with a coloured edge are ops. The way without logits goes around
    the left, where it crosses nothing."""
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='8' markerHeight='8' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 z' fill='{theme.muted}'/></marker></defs>"
    )
    parts = [tip, box(14, 8, 124, "hidden, lm_head", theme), box(14, 66, 124, "logits", theme)]
    parts += [box(162, 8, 166, "linear_token_logprobs", theme, True), box(162, 66, 166, "token_logprobs", theme, True)]
    parts += [box(354, 37, 126, "logp, entropy, ...", theme), box(354, 124, 126, "policy_loss", theme, True)]
    parts += [box(14, 124, 124, "rewards", theme), box(162, 124, 166, "advantages, mask, w", theme)]
    parts += [box(162, 182, 166, "linear_policy_loss", theme, True), box(354, 182, 126, "loss, metrics", theme)]
    for ends in ((138, 25, 160, 25), (138, 83, 160, 83), (328, 25, 352, 46), (328, 83, 352, 62), (417, 71, 417, 122),
                 (138, 141, 160, 141), (328, 141, 352, 141), (417, 158, 417, 180), (245, 158, 245, 180),
                 (328, 199, 352, 199)):  # fmt: skip
        parts.append(arrow(*ends, theme))
    way = "M14 25 L4 25 L4 199 L160 199"
    dashed = f"<path d='{way}' stroke='{theme.muted}' fill='none' stroke-dasharray='4 3' marker-end='url(#tip)'/>"
    parts += [dashed, text(14, 192, "one pass, no logits", theme.muted, 13)]
    return framed(WIDTH, 224, "From hidden states or logits to the loss", parts)


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
