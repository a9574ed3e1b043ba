"""Which kernels the Triton ops ask for, without compiling one: python launches.py (or launches.py canary).

Prints one JSON line per launch: the kernel, the call, and the key under which Triton looks for what it has compiled.
Each call is made with several batches that differ in nothing but their counts. The canary asks of every argument
whether it is 1 and whether 16 divides it, as Triton does where it is told nothing.
"""

import json
import sys
from collections.abc import Iterator

import torch
import triton
from aot import StandInDriver, divergence_cases, row_cases
from triton.runtime.jit import JITFunction, KernelParam

# Sequences, tokens of each, and rows that are each split over programs; 16 divides some of these numbers, one is 1.
BATCHES = ((16, 304, 4), (1, 301, 7), (3, 319, 6))


def tokens_of(sequences: int, length: int) -> Iterator[tuple]:
    from tokenrl.triton_kernels.gate_values import gate_values
    from tokenrl.triton_kernels.gates import GATES

    from tokenrl.objectives.preference import PREFERENCES
    from tokenrl.objectives.statistics import STATISTICS
    from tokenrl.ops.preference_ops import PreferenceOpInputs

    count = sequences * length
    x, flags, cu = torch.zeros(count), torch.zeros(count, dtype=torch.bool), torch.arange(sequences + 1) * length
    for name in STATISTICS:
        yield name, "statistic", (x, x, flags, cu, flags, name, "through")
        yield name, "statistic_backward", (x, flags, cu, flags, name, "through")
    yield "", "position_adaptive_clip", (x, flags, cu, [0.1, 0.1, 0.3], [None, x, None])
    yield "", "aggregation_weights", (flags, cu, count, x, cu[:-1], "balanced", "groups", 1.0)
    yield "", gate_values, (GATES["ratio"], *[x] * 5, [])
    row, none = next(iter(PREFERENCES.values())), (None,) * 4
    yield "", "preference", PreferenceOpInputs(
        x, *none, flags, cu, torch.zeros(sequences, 2, dtype=torch.int64), *none, flags, None, row.link.name,
        row.link.params(), row.score.name, row.score.params(), row.statistic, row.coupling, 0.0, row.divergence_flow,
        0.0, 1.0,
    )  # fmt: skip
    slopes, one = torch.zeros(3, sequences, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    yield "", "preference_backward", (one, slopes, x, *none, flags, cu, flags, True, [True, False, False, False])


def rows_of(rows: int, length: int) -> Iterator[tuple]:
    """Of a vocabulary that 16 divides and of an odd one; rows behind one another, and sliced out of longer batches."""
    from tokenrl.objectives.divergences import ForwardKl, TotalVariation

    for vocab in (512, 509):
        whole, longer = (torch.empty(rows, length + more, vocab, dtype=torch.bfloat16) for more in (0, 1))
        for where, logits in (("whole", whole), ("sliced", longer[:, :-1])):
            for everything in (False, True):
                label = f"V={vocab} {where} {everything}"
                yield from row_cases(label, logits, 1, everything)
                for kind in (ForwardKl(), TotalVariation()):
                    yield from divergence_cases(f"{label} {kind.name}", logits, kind, everything)


def split_rows_of(rows: int) -> Iterator[tuple]:
    from tokenrl.objectives.divergences import ForwardKl, TotalVariation

    logits = torch.empty(1, rows, 65536, dtype=torch.bfloat16)
    yield from row_cases("split", logits, 1, True)
    for kind in (ForwardKl(), TotalVariation()):
        yield from divergence_cases(f"split {kind.name}", logits, kind, False)


def main(canary: bool) -> None:
    found = []
    if canary:
        KernelParam.do_not_specialize = property(lambda self: False, lambda self, value: None)
    from tokenrl.triton_kernels import launch

    from tokenrl import triton_kernels

    triton.runtime.driver.set_active(StandInDriver(90))
    JITFunction._do_compile = lambda self, key, *_: found.append((self.__name__, key))
    for sequences, length, split in BATCHES:
        launch.multiprocessors = lambda device: 132
        calls = [*tokens_of(sequences, length), *split_rows_of(split)]
        for label, op, args in (*calls, *rows_of(sequences, length)):
            (op if callable(op) else triton_kernels.OPS[op])(*args)
            for name, key in found:
                print(json.dumps({"kernel": name, "call": f"{op if isinstance(op, str) else ''} {label}", "key": key}))
            found.clear()


if __name__ == "__main__":
    main("canary" in sys.argv)
