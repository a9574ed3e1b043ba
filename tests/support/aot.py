"""Compiles the Triton kernels through the package's own launchers without a GPU: python aot.py ARCH (or ARCH fifth, or
ARCH canary).

A stand-in driver names the target and nothing is launched, so arguments are specialised as on a GPU. Prints one JSON
line per kernel. Runs in its own process, without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from sass import Loop, loops
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class StandInDriver:
    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(arch: int, found: list) -> None:
    """From here on a launch compiles its kernel for `arch` and appends (name, kernel, seconds) to found."""
    triton.runtime.driver.set_active(StandInDriver(arch))
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.__name__, kernel, time.perf_counter() - start))
        return kernel

    JITFunction.run = warm_up


def dump(kernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def copies(loop: Loop) -> int:
    """Loads of 16 bytes to registers or to shared memory."""
    return loop.count("LDG.E.128") + loop.count("LDGSTS.E.BYPASS.128")


def resources(kernel, arch: int) -> dict:
    """Instructions of a turn of the loop over whole blocks, of several that of the rows that are no exception, which is
    the shortest; registers, stack bytes, accesses to them (a frame of which ptxas makes no use is no spill), shared
    memory, and the share of a multiprocessor's 64 warps that fit into it."""
    text = dump(kernel, "-res-usage")
    usage = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    sass = dump(kernel, "-sass")
    usage["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", sass)) if usage["stack"] else 0
    turns = [loop for loop in loops(sass) if loop.count("MUFU.EX2")]
    widest = max(map(copies, turns), default=0)
    usage["loop_instructions"] = min((len(loop.steady) for loop in turns if copies(loop) == widest), default=0)
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    memory = (164 if arch == 80 else 228) * 1024
    blocks = min(64 // warps, 65536 // (-(-usage["reg"] // 8) * 8 * 32 * warps), memory // (shared + 1024), 32)
    return usage | {"shared": shared, "warps": warps, "occupancy": blocks * warps / 64}


WIDE = r"ld\.global[.\w:]*\.v(?:4\.b32|8\.b32|2\.b64|4\.b64)|cp\.async\.cg\.shared\.global .*, 0x10"


def wide_loads(ptx: str) -> int:
    """Loads of at least 16 bytes from global memory in the PTX, to registers or (cp.async) to shared memory."""
    return len(re.findall(WIDE, ptx))


def steady_loop(ptx: str) -> dict:
    """Exponentials and 16-byte loads of one thread in a round of the loop that has such loads."""
    lines, labels, found = ptx.splitlines(), {}, {"loop_exponentials": 0, "loop_loads": 0}
    for j, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = j
        if (back := re.search(r"bra\S*\s+(\$L__BB\w+);", line)) and back[1] in labels:
            body = "\n".join(lines[labels[back[1]] : j])
            if wide_loads(body):
                found = {"loop_exponentials": body.count("ex2.approx"), "loop_loads": wide_loads(body)}
    return found


def objectives():
    """Every statistic x flow, with and without segments in turns, as the gates. A batch of 4 x 2000 tokens."""
    from tokenrl.objectives.gates import GATES
    from tokenrl.objectives.gates.bounded import LogBand
    from tokenrl.objectives.statistics import FLOWS

    pairs = [(s, f, k % 2 == 0) for k, (s, f) in enumerate((s, f) for s, flows in FLOWS.items() for f in flows)]
    x, flags, s = torch.zeros(8000), torch.zeros(8000, dtype=torch.bool), torch.zeros(4, dtype=torch.float64)
    cu, one = torch.arange(5) * 2000, torch.ones((), dtype=torch.float64)
    for k, (statistic, flow, segmented) in enumerate(pairs):
        gate = list(GATES)[k % len(GATES)]
        numbers = [0.5] * len(GATES[gate]().params())
        tensors = [x if gate == LogBand.name else None] * len(numbers)
        label = f"{statistic} {flow} {gate}{' segments' if segmented else ''}"
        args = (
            x,
            x,
            x[:4],
            flags,
            cu,
            flags if segmented else None,
            s,
            one,
            x if k % 2 else None,
            statistic,
            flow,
            gate,
        )
        yield label, "objective", (*args, numbers, tensors, 20.0, 10.0)
    d, rest = x.double(), ("prefix_mean", "through", "kl_k3", [10.0], [None], 20.0, 10.0)
    yield "prefix_mean through kl_k3 float64", "objective", (d, d, d, flags, cu, flags, s, one, d, *rest)


def parts():
    """The statistics, their adjoints, the clip and the aggregation weights."""
    from tokenrl.objectives.statistics import STATISTICS

    x, flags, cu = torch.zeros(8000), torch.zeros(8000, dtype=torch.bool), torch.arange(5) * 2000
    for name in STATISTICS:
        for starts in (None, flags):
            label = f"{name}{'' if starts is None else ' segments'}"
            yield label, "statistic", (x, x, flags, cu, starts, name, "through")
            if name.startswith("prefix"):
                yield label, "statistic_backward", (x, flags, cu, starts, name, "through")
    yield "", "position_adaptive_clip", (x, flags, cu, [0.1, 0.1, 0.3], [None, x, None])
    for span in ("one", "inverse_length", "group", "balanced"):
        yield (
            span,
            "aggregation_weights",
            (flags, cu, 8000, x if span == "balanced" else None, cu[:4], span, "groups", 1.0),
        )


def gates():
    """The gate alone, of most parameters and of none."""
    from tokenrl.triton_kernels.gate_values import gate_values
    from tokenrl.triton_kernels.gates import GATES

    for gate, numbers in (("hapo", [0.2, 0.2, 10.0, 0.5, 1.0, 1.0]), ("ratio", [])):
        for dtype in (torch.float32, torch.float64):
            yield f"{gate} {dtype}", gate_values, (GATES[gate], *[torch.zeros(4096, dtype=dtype)] * 5, numbers)


OUTPUTS = ("log_sum_sq_probs", "mean_logit", "max_prob", "is_top1", "rank")


def row_cases(label: str, logits, per_row: int, everything: bool):
    """Forward and backward of one call, the gradient in fresh memory and in the logits' own."""
    rows = logits.shape[:2]
    ids, stats = torch.zeros(*rows, per_row, dtype=torch.int64), torch.zeros(rows)
    grad, none = torch.zeros(*rows, per_row), torch.zeros(0)
    transform = (0.7, None, float("inf"), 1.0, None)
    grads, squares, outputs = (grad, stats, None, None), none, []
    if everything:
        keep = torch.ones(logits.shape[-1], dtype=torch.bool).expand(logits.shape)
        transform = (1.0, stats, 30.0, 0.5, keep)
        grads, squares, outputs = (grad, stats, stats, stats), stats, list(OUTPUTS)
    saved = (ids, stats, stats, stats, squares)
    yield label, "token_logprobs", (logits, ids, *transform, outputs, False)
    yield label, "token_logprobs_backward", (*grads, logits, *saved, *transform)
    yield f"{label} in place", "token_logprobs_backward_", (*grads, logits, *saved, *transform)


def logprobs():
    """Over a vocabulary that 16 bytes divide and, fewer, one that they do not; a single row is split over programs."""
    for vocab in (151936, 50257):
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{str(dtype).removeprefix('torch.')} V={vocab}"
            two, one = (torch.empty(1, rows, vocab, dtype=dtype) for rows in (2, 1))
            yield from row_cases(f"{label} plain", two, 1, False)
            yield from row_cases(f"{label} K=4 everything", two, 4, True)
            if vocab % 8 == 0:
                yield from row_cases(f"{label} K=1 everything", two, 1, True)
                yield from row_cases(f"{label} split", one, 1, False)


def divergence_cases(label: str, logits, kind, everything: bool):
    """Forward, and the gradients of both heads."""
    stats, flags = torch.zeros(logits.shape[:2]), None
    transform = (0.7, None, float("inf"), 1.0, None)
    if everything:
        keep = torch.ones(logits.shape[-1], dtype=torch.bool).expand(logits.shape)
        transform, flags = (1.0, stats, 30.0, 0.5, keep), torch.ones(logits.shape[:2], dtype=torch.bool)
    given = (flags, *transform, *transform, kind.name, kind.params())
    yield label, "divergence", (logits, logits, None, *given)
    for of in ("logits", "other_logits"):
        four = stats.expand(4, *stats.shape).contiguous()
        yield f"{label} {of}", "divergence_backward", (stats, logits, logits, stats, of, four, *given)


def divergences():
    """Every kind: plain, or with everything, in bf16 or fp32, of either vocabulary of logprobs, in turns."""
    from tokenrl.objectives.divergences import DIVERGENCES, ForwardKl, Jsd

    for k, kind in enumerate(DIVERGENCES.values()):
        dtype, vocab = (torch.bfloat16, torch.float32)[k // 2 % 2], (151936, 50257)[k // 4 % 2]
        label = f"{str(dtype).removeprefix('torch.')} V={vocab} {kind.name} {('plain', 'everything')[k % 2]}"
        yield from divergence_cases(label, torch.empty(1, 2, vocab, dtype=dtype), kind(), k % 2 == 1)
    for dtype, kind in ((torch.bfloat16, ForwardKl()), (torch.float32, Jsd())):
        label = f"{str(dtype).removeprefix('torch.')} V=151936 {kind.name} split"
        yield from divergence_cases(label, torch.empty(1, 1, 151936, dtype=dtype), kind, False)


def preferences():
    """Every link, every score and every coupling, with everything or plain in turns."""
    from tokenrl.objectives.preference import PREFERENCES
    from tokenrl.ops.preference_ops import PreferenceOpInputs

    x, mask, cu = torch.zeros(4096), torch.ones(4096, dtype=torch.bool), torch.arange(5) * 1024
    two_pairs, one = cu[:4].view(2, 2), torch.ones((), dtype=torch.float64)
    distinct = {(row.link.name, row.score.name, row.coupling): row for row in PREFERENCES.values()}
    for k, row in enumerate(distinct.values()):
        everything, labelled = k % 2 == 1, row.coupling == "labels"
        given = PreferenceOpInputs(
            x, x if row.divergence else None, x if everything else None, x if everything and row.divergence else None,
            x if row.reference == "given" else None, mask, cu, two_pairs if everything and not labelled else None,
            mask[:4] if labelled else None, one if labelled else None, None, one if everything else None,
            mask if everything else None, None, row.link.name, row.link.params(), row.score.name, row.score.params(),
            row.statistic, row.coupling, float(row.divergence), row.divergence_flow, float(row.length),
            1.0 if everything else row.nll,
        )  # fmt: skip
        yield f"float32 {row.name}", "preference", tuple(given)
    slopes = torch.zeros(3, 4, dtype=torch.float64)
    for everything in (False, True):
        tokens = (x, *[x if everything else None] * 4, mask, cu, mask if everything else None)
        yield "float32", "preference_backward", (x[0], slopes, *tokens, everything, [True, *[everything] * 3])


def canary():
    """The forward kernel with far too many logits per thread: it must be seen to spill."""
    from tokenrl.triton_kernels import launch

    launch.vocab_block, launch.vocab_warps = lambda *args, **options: 65536, lambda *args, **options: 4
    yield from list(logprobs())[:1]


MAKERS = (objectives, parts, gates, logprobs, divergences, preferences)


def main(arch: int, which: str) -> None:
    from tokenrl import triton_kernels

    found = []
    compile_only(arch, found)
    everything = [case for make in MAKERS for case in make()]
    chosen = {"all": everything, "fifth": everything[arch // 20 % 5 :: 5], "canary": canary()}  # 80: 4, 100: 0
    for label, op, args in chosen[which]:
        (op if callable(op) else triton_kernels.OPS[op])(*args)
        for name, kernel, seconds in found:
            row = {
                "arch": arch,
                "kernel": name,
                "case": label,
                "seconds": round(seconds, 2),
                "wide_loads": wide_loads(kernel.asm["ptx"]),
            }
            print(json.dumps(row | steady_loop(kernel.asm["ptx"]) | resources(kernel, arch)), flush=True)
        found.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "all")
