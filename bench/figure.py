"""The figure: what each case reaches of its limit, and how it compares."""

from pathlib import Path

COLOURS = {"forward": "#3b6fb6", "both": "#d98032"}
TITLES = {"forward": "forward", "both": "forward+backward"}


def label(line: dict) -> str:
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[line["dtype"]]
    variant = f", {line['variant']}" if line.get("variant") else ""
    return f"{line['op']} {'x'.join(map(str, line['shape']))}\n{dtype}, {line['backend']}{variant}"


def rate(line: dict, key: str) -> str:
    gflops = line.get(f"{key}_gflops")
    return f"{line[f'{key}_gbps']:.3g} GB/s" if gflops is None else f"{gflops:,.0f} GFLOP/s"


def shares(axes, lines: list[dict]) -> None:
    """Bars: per cent of the limit of the case, which is named beside them, with the rate reached."""
    for offset, key in ((-0.2, "forward"), (0.2, "both")):
        at, values = [i + offset for i in range(len(lines))], [line[f"{key}_percent"] for line in lines]
        axes.barh(at, values, 0.36, color=COLOURS[key], label=TITLES[key])
        for y, x, line in zip(at, values, lines, strict=True):
            axes.text(x, y, f" {x:.0f}% {line[f'{key}_limit']}, {rate(line, key)}", va="center", fontsize=8)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_yticks(range(len(lines)), [label(line) for line in lines], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("per cent of the limit: bandwidth or exponentials of this machine, or the bare GEMMs")
    axes.set_title("Reached of what is possible", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")


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
    shares(left, lines)
    ratios(right, lines)
    figure.suptitle(report["machine"], fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
