"""What a loop of a kernel issues, read from its machine code (SASS).

A loop is a jump back, `tail` to `head`, with every instruction on a way from head to tail; all that enters comes by its
head. Its *steady way* is the shortest: the one taken where no rare branch is, such as a running maximum that moves.
"""

import collections
import re
from collections.abc import Container
from typing import NamedTuple

CONTROL = {"BRA", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "EXIT", "WARPSYNC", "NOP", "BAR", "YIELD"}
MEMORY = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "ATOMG", "RED"}


class Instruction(NamedTuple):
    at: int
    guarded: bool  # runs only where its predicate says so
    operation: str  # with its modifiers: LDG.E.128
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.operation.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """The next instruction never follows: an end, or a jump that asks for nothing but its target."""
        name = self.operation.split(".")[0]
        always = not self.guarded and (name != "BRA" or self.operands.startswith("0x"))
        return name in ("BRA", "EXIT", "RET") and always

    @property
    def kind(self) -> str:
        """MUFU, FP, INT, control, or a memory operation with its width in bits."""
        name, *modifiers = self.operation.split(".")
        if name in MEMORY:
            widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
            return f"{name}.{next((widths[m] for m in modifiers if m in widths), 32)}"
        if name in CONTROL:
            return "control"
        return "MUFU" if name == "MUFU" else "FP" if re.match(r"[FDH][^L]|VHMNMX", name) else "INT"


class Loop(NamedTuple):
    every: list[Instruction]  # on any way through it
    steady: list[Instruction]  # on the shortest

    def count(self, operation: str) -> int:
        """Of the instructions on the steady way whose name and modifiers begin so."""
        return sum(i.operation.startswith(operation) for i in self.steady)

    def kinds(self) -> dict[str, int]:
        return collections.Counter(i.kind for i in self.steady)


def instructions(kernel: str) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", kernel)
    return [Instruction(int(at, 16), bool(guard), operation, operands) for at, guard, operation, operands in lines]


def _reached(start: int, steps: dict[int, list[int]], allowed: Container[int] | None, stop: int) -> dict[int, int]:
    """Whatever `start` reaches without passing `stop`, each with the one before it on the shortest way."""
    before, waiting = {start: start}, collections.deque([start])
    while waiting:
        here = waiting.popleft()
        for then in steps[here] if here != stop else ():
            if then not in before and (allowed is None or then in allowed):
                before[then] = here
                waiting.append(then)
    return before


def _steps(code: dict[int, Instruction]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Of each instruction those that may come next, and those that may have come before."""
    places = list(code)
    after: dict[int, list[int]] = {at: [] for at in places}
    for at, then in zip(places, places[1:], strict=False):
        after[at] += [] if code[at].ends else [then]
    before: dict[int, list[int]] = {at: [] for at in places}
    for at, instruction in code.items():
        after[at] += [instruction.target] if instruction.target in code else []
        for then in after[at]:
            before[then].append(at)
    return after, before


def _way(start: int, end: int, steps: dict[int, list[int]]) -> int:
    """Instructions on the shortest way, the start not counted."""
    reached, length = _reached(start, steps, None, end), 0
    while end != start:
        end, length = reached[end], length + 1
    return length


def beside(kernel: str, loop: Loop, operation: str) -> int:
    """Instructions on the shortest way through a kernel and its loop that passes the last such operation behind it, the
    loop's own not counted. Other loops are left by their first exit."""
    code = {i.at: i for i in instructions(kernel)}
    after, _ = _steps(code)
    head, tail = loop.steady[0].at, loop.steady[-1].at
    behind = _reached(tail, after, {at for at in code if not head <= at <= tail}, tail + 1)
    ends = [at for at in behind if code[at].operation == "EXIT" and at != tail]
    ways = [
        _way(tail, at, after) + min(_way(at, end, after) for end in ends if end in _reached(at, after, None, end))
        for at in behind
        if code[at].operation.startswith(operation) and any(end in _reached(at, after, None, end) for end in ends)
    ]
    return _way(min(code), head, after) + max(ways)


def loops(kernel: str) -> list[Loop]:
    """All of a kernel's, each jump back one."""
    code = {i.at: i for i in instructions(kernel)}
    places = list(code)
    after, before = _steps(code)
    found = []
    for tail, head in [(at, i.target) for at, i in code.items() if i.target is not None and i.target < at]:
        body = _reached(tail, before, None, head)
        if head not in body or tail in _reached(places[0], after, None, head):
            continue
        ways = _reached(head, after, body, tail)
        steady = [tail]
        while steady[-1] != head:
            steady.append(ways[steady[-1]])
        found.append(Loop([code[at] for at in sorted(ways)], [code[at] for at in reversed(steady)]))
    return found


def longest_way(loop: Loop, apart: list[Loop]) -> list[Instruction]:
    """The longest way from a loop's head to its tail that enters none of the loops `apart`: the most that one turn
    takes, as of two sides of a branch it takes one."""
    code = {i.at: i for i in loop.every if not any(i in other.every for other in apart)}
    head, tail = loop.steady[0].at, loop.steady[-1].at
    places = [i.at for i in loop.every]
    behind = dict(zip(places, places[1:], strict=False))
    way: dict[int, list[Instruction] | None] = {tail: [code[tail]]}
    # Jumps within a turn go forwards: each place is reached after those before it.
    for at in sorted(code, reverse=True):
        if at == tail:
            continue
        steps = [] if code[at].ends else [behind.get(at)]
        ways = [way[then] for then in (*steps, code[at].target) if then is not None and way.get(then) and then > at]
        best = max(ways, key=len, default=None)
        way[at] = best and [code[at], *best]
    found = way.get(head)
    assert found, "no way through the loop without the loops apart"
    return found


def steady_loops(kernel: str, wide_loads: int = 4) -> list[Loop]:
    """Those whose steady way has so many 16-byte loads, none of them around another such loop."""
    wide = [loop for loop in loops(kernel) if loop.count("LDG.E.128") == wide_loads]
    return [loop for loop in wide if not any(set(other.every) < set(loop.every) for other in wide)]
