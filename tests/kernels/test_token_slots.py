"""What the objective, its statistics and the count of valid tokens issue per token on sm_90, counted in their machine
code: all ways through a loop together, so more than any token takes.

A multiprocessor of an H200 issues 128 thread instructions in the cycle in which it reads about one token's 13 bytes.
"""

import functools

import account
import pytest
from nvcc import needs_nvcc, sass
from sass import Loop, loops

ITEMS = 4  # consecutive tokens of a thread
# The most of one token in the gate's loop, and of a thread's tokens around it.
GATES = {"PpoClip": (240, 250), "LogBand": (330, 250)}
SCAN = 850  # of a statistic along a sequence, per ITEMS tokens: both ways to load and store them among it


def count(loop: Loop, *beginnings: str) -> int:
    return sum(i.operation.startswith(beginnings) for i in loop.every)


def around(inner: Loop, candidates: list[Loop]) -> Loop:
    """The smallest loop that has it within."""
    return min((one for one in candidates if set(inner.every) < set(one.every)), key=lambda one: len(one.every))


def kernel_of(source: str, *names: str) -> str:
    (name,) = [name for name in sass(source) if all(part in name for part in names)]
    return sass(source)[name]


@functools.cache
def gate_loops(gate: str) -> tuple[Loop, Loop]:
    """That of a token, with the gate's exponentials, and that of a thread's tokens."""
    found = loops(kernel_of("objective_float", f"{gate}E"))
    token = min((loop for loop in found if count(loop, "MUFU.EX2")), key=lambda loop: len(loop.every))
    return token, around(token, found)


@needs_nvcc
def test_a_token_of_the_objective_is_within_its_budget(record_property):
    lines, beyond = ["issue slots per token, sm_90, every way together:"], []
    for gate, (of_token, of_items) in GATES.items():
        token, items = gate_loops(gate)
        rest = len(items.every) - len(token.every)
        lines.append(f"{'objective ' + gate:36} {len(token.every):4} and {rest / ITEMS:6.2f} of its loads and stores")
        beyond += [gate] if len(token.every) > of_token or rest > of_items else []
        assert not count(items, "LDL", "STL"), f"{gate}: registers in memory"
        assert count(items, "LDG.E.128") == 3, f"{gate}: log-probs, and the statistic, 16 bytes at a time"
    record_property(account.SHOWN, "\n".join(lines))
    assert not beyond, (beyond, lines)


@needs_nvcc
def test_the_scan_of_a_statistic_is_within_its_budget():
    """The walks of the statistics: those loops that meet in a barrier."""
    found = loops(kernel_of("statistic", "statistic_kernelIf"))
    walks = [loop for loop in found if count(loop, "BAR") == 2 and count(loop, "SHFL")]
    chunks = [loop for loop in walks if not any(set(other.every) < set(loop.every) for other in walks)]
    assert len(chunks) == 4  # forwards a sum and a minimum, backwards a sum and a copy
    assert all(len(loop.every) <= SCAN + 80 for loop in chunks), [len(loop.every) for loop in chunks]
    assert not any(count(loop, "LDL", "STL") for loop in chunks)


@needs_nvcc
def test_valid_tokens_are_counted_16_at_a_time():
    found = [loop for loop in loops(kernel_of("aggregation_weights", "count_kernel")) if loop.count("LDG.E.128") == 4]
    assert found and all(len(loop.every) <= 48 for loop in found), [len(loop.every) for loop in found]
    assert not any(i.guarded for loop in found for i in loop.every[:-1]), "nothing depends on a cell"


@pytest.mark.parametrize("gate", GATES)
@needs_nvcc
def test_what_is_counted_is_the_gate(gate):
    """Its exponential, and the wide ones of the metrics: a smaller loop would be another."""
    token, items = gate_loops(gate)
    assert count(token, "MUFU.EX2") >= 3 and count(token, "DADD", "DFMA") >= 3 and len(items.every) > len(token.every)
