"""The figure: what each case reaches of its limit, and how it compares."""

from pathlib import Path

COLOURS = {"forward": "#3b6fb6", "both": "#d98032"}
TITLES = {"forward": "forward", "both": "forward+backward"}


def label(line: dict) -> str:
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[line["dtype"]]
    return f"{line['op']} {line['shape'][0]}x{line['shape'][1]}\n{dtype}, {line['backend']}"


def roofline(axes, lines: list[dict]) -> None:
    """Bars: GB/s reached. Ticks: the GB/s that the limit of the case allows."""
    for offset, key in ((-0.2, "forward"), (0.2, "both")):
        at = [i + offset for i in range(len(lines))]
        axes.barh(at, [line[f"{key}_gbps"] for line in lines], 0.36, color=COLOURS[key], label=TITLES[key])
        allowed = [line[f"{key}_bytes"] / line[f"{key}_limit_ms"] / 1e6 for line in lines]
        axes.plot(allowed, at, "|", color="black", markersize=13, markeredgewidth=2)
        for y, x, line in zip(at, allowed, lines, strict=True):
            text = f" {line[f'{key}_limit']}: {line[f'{key}_percent']:.0f}%"
            axes.text(max(x, line[f"{key}_gbps"]), y, text, va="center", fontsize=8)
    axes.plot([], [], "|", color="black", markersize=10, markeredgewidth=2, label="limit of this machine")
    axes.set_yticks(range(len(lines)), [label(line) for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("GB/s of the ideal kernel's traffic")
    axes.set_title("Reached and possible", fontsize=10)
    axes.legend(fontsize=8, loc="upper right")


def ratios(axes, lines: list[dict]) -> None:
    """Bars: the competitor's time over ours, forward+backward (forward alone where it has no backward)."""
    rivals = list(dict.fromkeys(name for line in lines for name in line["versus"]))
    height = 0.8 / max(len(rivals), 1)
    for number, rival in enumerate(rivals):
        pairs = [line["versus"].get(rival) for line in lines]
        values = [None if pair is None else pair[0] if pair[1] is None else pair[1] for pair in pairs]
        shown = [(i - 0.4 + (number + 0.5) * height, v) for i, v in enumerate(values) if v is not None]
        axes.barh([y for y, _ in shown], [v for _, v in shown], height * 0.9, label=f"{rival}", color=f"C{number}")
        for y, v in shown:
            axes.text(v, y, f" {v:.3g}x", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(lines)), [])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("time of the competitor / time of tokenrl, forward+backward")
    axes.set_title("Times as fast as", fontsize=10)
    if rivals:
        axes.legend(fontsize=8)


def draw(report: dict, path: Path) -> None:
    """Writes the figure as PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = [line for line in report["lines"] if line["ours"]]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 1.8 + 0.75 * max(len(lines), 1)), layout="constrained")
    roofline(left, lines)
    ratios(right, lines)
    figure.suptitle(report["machine"], fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
