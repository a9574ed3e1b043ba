"""What the steady loops of the log-prob kernels issue per logit on sm_90, counted in their machine code.

A multiprocessor of an H200 issues 128 thread instructions per cycle and reads about 17 bytes in it: up to some 13 per
bf16 logit in the forward, and twice that in the backward, the memory is what limits.
"""

import functools
from typing import NamedTuple

import account
import pytest
from nvcc import compile_report, needs_nvcc, sass
from paths import ROOT
from sass import Loop, beside, instructions, loops, steady_loops

IN_FLIGHT = 4  # packs of 16 bytes per turn of a loop
NAMES = {"bf16": "8BFloat16", "fp16": "4Half", "fp32": "kernelIf"}  # as they are mangled into a kernel's name


class Budget(NamedTuple):
    """The most that one kernel may take: instructions and special functions per logit, registers per thread."""

    source: str
    kernel: str
    logit: str
    slots: float
    exponentials: float
    registers: int

    @property
    def logits(self) -> int:
        return IN_FLIGHT * (4 if self.logit == "fp32" else 8)

    def names(self, kernel: str) -> bool:
        return self.kernel in kernel and NAMES[self.logit] in kernel and "merge" not in kernel


BUDGETS = (
    # 64 registers: four blocks of 256 threads per multiprocessor; 80: three.
    Budget("token_logprobs", "SoftmaxOnly", "bf16", 7.25, 1 + 1 / 32, 64),
    Budget("token_logprobs", "SoftmaxOnly", "fp16", 7.25, 1 + 1 / 32, 64),
    Budget("token_logprobs", "SoftmaxOnly", "fp32", 7.5, 1 + 1 / 16, 64),
    Budget("token_logprobs", "short_rows", "bf16", 7.25, 1 + 1 / 32, 64),
    Budget("token_logprobs", "short_rows", "fp32", 7.5, 1 + 1 / 16, 64),
    Budget("token_logprobs_backward", "short_rows", "bf16", 8.5, 1, 80),
    Budget("token_logprobs_backward", "short_rows", "fp32", 7.75, 1, 80),
    Budget("token_logprobs_backward", "Proportional", "bf16", 5.25, 1, 80),
    Budget("token_logprobs_backward", "Proportional", "fp16", 5.25, 1, 80),
    Budget("token_logprobs_backward", "Proportional", "fp32", 4.5, 1, 80),
    Budget("token_logprobs_backward", "Curved", "bf16", 8.25, 1, 80),
    Budget("token_logprobs_backward", "Curved", "fp16", 8.25, 1, 80),
    Budget("token_logprobs_backward", "Curved", "fp32", 7.5, 1, 80),
)


def faults(budget: Budget, loop: Loop, registers: int) -> list[str]:
    """What of a loop is beyond its budget; on every way through it, so that nothing rare hides."""
    kinds = [i.kind for i in loop.every]
    found = [] if len(kinds) <= budget.slots * budget.logits else [f"{len(kinds) / budget.logits} slots per logit"]
    if kinds.count("MUFU") > budget.exponentials * budget.logits:
        found.append(f"{kinds.count('MUFU') / budget.logits} special functions per logit")
    if narrow := {kind for kind in kinds if kind.startswith(("LD", "ST")) and kind not in ("LDG.128", "STG.128")}:
        found.append(f"memory by less than 16 bytes: {sorted(narrow)}")
    if "LDG.128" in kinds[kinds.index("MUFU") :] or kinds.count("LDG.128") != IN_FLIGHT:
        found.append("not all loads of a turn are on their way before the first is used")
    if kinds.count("STG.128") != (IN_FLIGHT if "backward" in budget.source else 0):
        found.append(f"{kinds.count('STG.128')} stores of 16 bytes")
    return found + ([f"{registers} registers"] if registers > budget.registers else [])


@functools.cache
def measured(budget: Budget) -> tuple[Loop, int]:
    """The loop over aligned rows, and the kernel's registers."""
    (name,) = filter(budget.names, sass(budget.source))
    (loop,) = steady_loops(sass(budget.source)[name], IN_FLIGHT)
    report = compile_report(ROOT / "csrc" / "cuda" / f"{budget.source}.cu")
    return loop, next(int(row["registers"]) for row in report if row["kernel"] == name and row["arch"] == "90")


@needs_nvcc
def test_the_loops_are_within_their_budgets(record_property):
    kinds = ["LDG.128", "STG.128", "MUFU", "FP", "INT", "control"]
    lines = [f"{'issue slots per logit, sm_90':44} slots {'  '.join(f'{kind:>7}' for kind in kinds)}  registers"]
    for budget in BUDGETS:
        loop, registers = measured(budget)
        parts = "  ".join(f"{loop.kinds()[kind] / budget.logits:7.3f}" for kind in kinds)
        title = f"{budget.source} {budget.kernel} {budget.logit}"
        lines.append(f"{title:44} {len(loop.every) / budget.logits:5.2f} {parts} {registers:10}")
    record_property(account.SHOWN, "\n".join(lines))
    beyond = {budget: found for budget in BUDGETS if (found := faults(budget, *measured(budget)))}
    assert not beyond, beyond


@needs_nvcc
def test_what_a_row_costs_beside_its_loop(record_property):
    """Where it begins, what its threads found made one, and what is stored: 3634 slots when each lane's state was
    merged with another's. Of a block the first warp stores, and the seven others leave behind the last barrier."""
    found = {}
    for kernel in ("short_rows", "SoftmaxOnly"):
        budget = next(b for b in BUDGETS if (b.kernel, b.logit) == (kernel, "bf16"))
        (name,) = filter(budget.names, sass(budget.source))
        text, loop = sass(budget.source)[name], measured(budget)[0]
        stores = beside(text, loop, "STG")
        found[kernel] = stores if kernel == "short_rows" else stores + 7 * beside(text, loop, "BAR")
    record_property(account.SHOWN, f"issue slots of a row of bf16 logits beside its loop, sm_90: {found}")
    assert 100 < found["short_rows"] <= 350 and found["SoftmaxOnly"] <= 2700, found


LISTING = """
 /*0000*/       MOV R1, c[0x0][0x28] ;
 /*0010*/       LDG.E.128 R4, desc[UR4][R2.64] ;
 /*0020*/       FSETP.GT.FTZ.AND P0, PT, R4, R8, PT ;
 /*0030*/       MUFU.EX2 R9, R4 ;
 /*0040*/  @!P0 BRA 0x70 ;
 /*0050*/       MUFU.EX2 R10, R8 ;
 /*0060*/       FMUL R9, R9, R10 ;
 /*0070*/  @P2  BRA 0xd0 ;
 /*0080*/       STG.E.U16 desc[UR4][R2.64], R9 ;
 /*0090*/       IADD3 R2, P1, R2, 0x10, RZ ;
 /*00a0*/  @P1  BRA 0x10 ;
 /*00b0*/       EXIT ;
 /*00c0*/       BRA 0xc0;
 /*00d0*/       FADD R9, R9, 1 ;
 /*00e0*/       BRA 0x80 ;
"""


def test_what_a_loop_issues():
    """A branch within it, and one to a place behind the kernel's end and back, which is no loop of its own."""
    (loop,) = loops(LISTING)
    assert [hex(i.at) for i in loop.every] == [hex(16 * k) for k in (*range(1, 11), 13, 14)]
    assert [i.at for i in loop.steady] == [16 * k for k in (1, 2, 3, 4, 7, 8, 9, 10)]
    assert loop.kinds() == {"LDG.128": 1, "FP": 1, "MUFU": 1, "control": 3, "STG.16": 1, "INT": 1}
    assert steady_loops(LISTING, 1) == [loop] and steady_loops(LISTING, 2) == []
    # In by the first, out by the last, which is no store.
    assert beside(LISTING, loop, "EXIT") == 2


@needs_nvcc
@pytest.mark.parametrize(
    "change, complaint",
    {
        ("STG.E.128", "STG.E.64"): "less than 16 bytes",
        ("FFMA", "MUFU.EX2"): "special functions",
        ("FFMA", "FFMA R0, R0, R0, R0 ;\n /*{}8*/ FFMA"): "slots",
        ("LDG.E.128", "NOP"): "not all loads",
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worse_loop_is_beyond_its_budget(change, complaint):
    """The loop of a kernel with some of its instructions exchanged, or twice as many of them."""
    budget = next(b for b in BUDGETS if b.kernel == "Curved" and b.logit == "bf16")
    loop, registers = measured(budget)
    old, new = change
    text = "\n".join(
        f" /*{i.at:04x}*/ {i.operation.replace(old, new.format(f'{i.at:04x}'[:-1]))} {i.operands} ;" for i in loop.every
    )
    worse = instructions(text)
    assert len(worse) >= len(loop.every)
    assert any(complaint in fault for fault in faults(budget, Loop(worse, worse), registers))
    assert any("registers" in fault for fault in faults(budget, loop, budget.registers + 1))
