"""python -m bench: correctness first, then one line per case and backend, beside eager PyTorch in the same process."""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from tokenrl import backends

from .cases import Case, cases


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step(call, backward: bool):
    value, x = call()
    if not backward:
        return value
    return torch.autograd.grad(value, x)[0]


def paired_medians(calls: dict, device: str, backward: bool, repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns so that the machine's noise falls on all of them."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            sync(device)
            start = time.perf_counter()
            step(call, backward)
            sync(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read plus write: the limit that per cent refers to."""
    x = torch.empty((1 << 30) if device == "cuda" else (1 << 28), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(6):
        sync(device)
        start = time.perf_counter()
        y.copy_(x)
        sync(device)
        times.append(time.perf_counter() - start)
    return 2 * x.numel() / min(times[1:])


def wrong(case: Case, backend: str) -> str | None:
    """Why a backend's value or gradient is not the eager spelling's, or None; no speed is printed for a wrong result."""
    for backward in (False, True):
        found, expected = (step(call, backward).double() for call in (lambda: case.run(backend), case.eager))
        error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        if not error < 5e-3:
            return f"{'gradient' if backward else 'value'} differs from eager by {error:.1e}"
    return None


def measure(case: Case, names: list[str], device: str, repeats: int, limit: float) -> list[dict]:
    calls = {"eager": case.eager} | {name: (lambda name=name: case.run(name)) for name in names}
    forward = paired_medians(calls, device, False, repeats)
    both = paired_medians(calls, device, True, repeats)
    lines = []
    for name in calls:
        rate = case.forward_bytes / forward[name]
        lines.append({
            "op": case.op, "shape": case.shape, "backend": name, "forward ms": forward[name] * 1e3,
            "forward+backward ms": both[name] * 1e3, "forward GB/s": rate / 1e9, "% of copy": 100 * rate / limit,
            "forward vs eager": forward["eager"] / forward[name], "both vs eager": both["eager"] / both[name],
        })  # fmt: skip
    return lines


def machine_line(device: str, limit: float) -> str:
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}; copy {limit / 1e9:.1f} GB/s"


def table(lines: list[dict]) -> str:
    head = list(lines[0])
    rows = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--check-only", action="store_true", help="small sizes, correctness only")
    parser.add_argument("--out", type=Path, help="folder that receives the table and its JSON")
    options = parser.parse_args()
    device = options.device
    names = [
        n for n, b in backends.BACKENDS.items()
        if n != "reference" and b.automatic(torch.device(device)) and b.why_not(torch.device(device)) is None
    ]  # fmt: skip
    limit = 1.0 if options.check_only else copy_bandwidth(device)
    lines, failures = [], []
    for case in cases(device, options.check_only):
        right = []
        for name in names:
            reason = wrong(case, name)
            if reason:
                failures.append(f"{case.op} {case.shape} {name}: {reason}")
            else:
                right.append(name)
        if not options.check_only:
            lines += measure(case, right, device, options.repeats, limit)
    print(f"backends on {device}: {', '.join(names) or 'none'}")
    if lines:
        text = f"{machine_line(device, limit)}\n\n{table(lines)}\n"
        print(text)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{device}.md").write_text(text)
            (options.out / f"{device}.json").write_text(
                json.dumps({"machine": machine_line(device, limit), "lines": lines}, indent=1)
            )
    if failures:
        raise SystemExit("\n".join(["wrong results:", *failures]))
    print("every result agrees with eager PyTorch")


if __name__ == "__main__":
    main()
