"""What the objective, its statistics and the count of valid tokens issue per token on sm_90, counted in their machine
code: the longest way through a turn of their loops, so of whole quads of tokens that lie anyhow, with advantages and
weights of their own, as many as any such token takes.

A multiprocessor of an H200 issues 128 thread instructions in the cycle in which it reads about one token's 13 bytes.
"""

import functools

import account
import pytest
from nvcc import needs_nvcc, sass
from sass import Loop, longest_way, loops

ITEMS = 4  # consecutive tokens of a thread
# The most of one token. Apart are the loops that few take: of tokens at a tile's end, of bounds per token, of ratios
# beyond e^40. 292 and 382 were counted when every way was, and each token came by itself; 160 were asked of PpoClip.
# What LogBand has beyond it is the position's power, and the exponential of the bound.
GATES = {"PpoClip": 160, "LogBand": 225}
# Of a statistic along a sequence, per ITEMS tokens.
SCAN = 720


def count(loop: Loop, *beginnings: str) -> int:
    return sum(i.operation.startswith(beginnings) for i in loop.every)


def within(loop: Loop, candidates: list[Loop]) -> list[Loop]:
    return [one for one in candidates if set(one.every) < set(loop.every)]


def kernel_of(source: str, *names: str) -> str:
    (name,) = [name for name in sass(source) if all(part in name for part in names)]
    return sass(source)[name]


@functools.cache
def gate_loops(gate: str) -> tuple[Loop, list[Loop]]:
    """That of a thread's tokens, with an exponential of each, and those within it."""
    found = loops(kernel_of("objective_float", f"{gate}E"))
    items = min((loop for loop in found if count(loop, "MUFU.EX2") >= 2 * ITEMS), key=lambda loop: len(loop.every))
    return items, within(items, found)


@needs_nvcc
def test_a_token_of_the_objective_is_within_its_budget(record_property):
    lines, beyond = ["issue slots per token, sm_90, the longest way:"], []
    for gate, most in GATES.items():
        items, apart = gate_loops(gate)
        slots = len(longest_way(items, apart)) / ITEMS
        lines.append(f"{'objective ' + gate:36} {slots:7.2f}")
        beyond += [gate] if slots > most else []
        assert not count(items, "LDL", "STL"), f"{gate}: registers in memory"
        assert count(items, "LDG.E.128") == 5 + (gate == "LogBand"), f"{gate}: every array 16 bytes at a time"
    record_property(account.SHOWN, "\n".join(lines))
    assert not beyond, (beyond, lines)


@needs_nvcc
def test_the_scan_of_a_statistic_is_within_its_budget():
    """The walks of the statistics: those loops that meet in a barrier."""
    found = loops(kernel_of("statistic", "statistic_kernelIf"))
    walks = [loop for loop in found if count(loop, "BAR") == 2 and count(loop, "SHFL")]
    chunks = [loop for loop in walks if not within(loop, walks)]
    assert len(chunks) == 4  # forwards a sum and a minimum, backwards a sum and a copy
    slots = [len(longest_way(loop, within(loop, found))) for loop in chunks]
    assert max(slots) <= SCAN, slots
    assert not any(count(loop, "LDL", "STL") for loop in chunks)


@needs_nvcc
def test_valid_tokens_are_counted_16_at_a_time():
    found = [loop for loop in loops(kernel_of("aggregation_weights", "count_kernel")) if loop.count("LDG.E.128") == 4]
    assert found and all(len(loop.every) <= 48 for loop in found), [len(loop.every) for loop in found]
    assert not any(i.guarded for loop in found for i in loop.every[:-1]), "nothing depends on a cell"


@pytest.mark.parametrize("gate", GATES)
@needs_nvcc
def test_what_is_counted_is_the_gate(gate):
    """Its four exponentials, and none of what is counted apart: the wide sums of far ratios, which are in doubles."""
    items, apart = gate_loops(gate)
    way = longest_way(items, apart)
    kinds = [i.operation for i in way]
    assert sum(kind.startswith("MUFU.EX2") for kind in kinds) >= 2 * ITEMS and not any("DFMA" in kind for kind in kinds)
    assert any(count(loop, "DADD", "DMUL") for loop in apart) and len(way) < len(items.every)


LISTING = """
 /*0000*/       MOV R1, c[0x0][0x28] ;
 /*0010*/       LDG.E R4, desc[UR4][R2.64] ;
 /*0020*/  @P0  BRA 0x60 ;
 /*0030*/       FADD R9, R9, 1 ;
 /*0040*/       FADD R9, R9, 2 ;
 /*0050*/       BRA 0x80 ;
 /*0060*/       FADD R9, R9, 3 ;
 /*0070*/  @P3  BRA 0x60 ;
 /*0080*/  @P1  BRA 0x10 ;
 /*0090*/       EXIT ;
"""


def test_the_longest_way_takes_one_side_of_a_branch():
    inner, outer = sorted(loops(LISTING), key=lambda loop: len(loop.every))
    assert [i.at for i in longest_way(outer, [])] == [16 * k for k in (1, 2, 3, 4, 5, 8)]
    assert len(longest_way(outer, [inner])) == 6 and len(longest_way(inner, [])) == 2
