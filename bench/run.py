"""One case: every backend checked, then timed beside its competitors."""

from dataclasses import dataclass, field

from tokenrl import backends

from .cases import Case
from .check import Truth, Verdict, truth, verdict
from .competitors import Competitor, competitors, first_line
from .measure import Limits, host_syncs, launches, limits, paired_medians, peak_memory, thunk


@dataclass
class Findings:
    """lines, heads: what was measured, from logits and from hidden states. missing: (case, competitor, reason).
    failures: wrong backends. passed: right ones."""

    lines: list[dict] = field(default_factory=list)
    heads: list[dict] = field(default_factory=list)
    missing: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One call of a case that may be timed."""

    competitor: Competitor
    verdict: Verdict
    ours: bool

    def thunk(self, case: Case, backward: bool):
        return thunk(case, self.competitor.call, backward)


def our_call(case: Case, name: str) -> Competitor:
    return Competitor(name, lambda *inputs: case.run(name, *inputs))


def checked_backends(case: Case, names: list[str], against: Truth, findings: Findings) -> list[Entry]:
    """The backends whose results are right; the others become failures."""
    entries = []
    for name in names:
        mine = our_call(case, name)
        try:
            found = verdict(case, mine.call, against)
        except Exception as error:  # a backend that raises is reported like one that is wrong, and the others still run
            findings.failures.append(f"{case.name} {name}: {first_line(error)}")
            continue
        if found.reason:
            findings.failures.append(f"{case.name} {name}: {found.reason}")
        else:
            findings.passed.append(f"{case.name} {name}")
            entries.append(Entry(mine, found, True))
    return entries


def running_competitors(case: Case, device: str, compile: bool, against: Truth, findings: Findings) -> list[Entry]:
    """The competitors that run; the others are named with their reason."""
    entries = []
    for rival in competitors(case, device, compile):
        reason, found = rival.reason, Verdict(None, None, None)
        if rival.call is not None:
            try:
                if rival.backward:
                    found = verdict(case, rival.call, against, strict=False)
                else:
                    rival.call(*case.inputs)
            except Exception as error:  # whatever stops somebody else's code is the reason
                reason = first_line(error)
        if reason:
            findings.missing.append({"case": case.name, "competitor": rival.name, "reason": reason})
        else:
            entries.append(Entry(rival, found, False))
    return entries


def speed(case: Case, medians: list[float | None], bounds: Limits) -> dict:
    """Times, rates and per cent of the limit, forward and forward plus backward."""
    forward_limit, forward_name = bounds.least(case.forward)
    backward_limit, backward_name = bounds.least(case.backward)
    least = (forward_limit, forward_limit + backward_limit)
    moved = (case.forward.bytes, case.forward.bytes + case.backward.bytes)
    line = {"forward_limit": forward_name, "both_limit": f"{forward_name}+{backward_name}"}
    for key, taken, limit, size in zip(("forward", "both"), medians, least, moved, strict=True):
        line[f"{key}_bytes"] = size
        line[f"{key}_limit_ms"] = 1e3 * limit
        line[f"{key}_ms"] = None if taken is None else 1e3 * taken
        line[f"{key}_gbps"] = None if taken is None else size / taken / 1e9
        line[f"{key}_percent"] = None if taken is None else 100 * limit / taken
    return line


def counts(case: Case, entry: Entry, both_ms: float | None, bounds: Limits, device: str) -> dict:
    """What only the objectives are asked for: bytes per token, launches and host syncs of forward and backward."""
    if case.op != "policy_loss":
        return {}
    call = entry.thunk(case, True)
    opaque = device == "cpu" and entry.competitor.name == "compile"  # its loops are no ops
    return {
        "model_bytes_per_token": (case.forward.bytes + case.backward.bytes) / case.tokens,
        "time_as_bytes_per_token": None if both_ms is None else both_ms / 1e3 * bounds.copy / case.tokens,
        "launches": None if opaque else launches(call, device),
        "host_syncs": host_syncs(call, device),
    }


def measure(case: Case, entries: list[Entry], device: str, repeats: int) -> list[dict]:
    """One line per entry, ours first; ours with the ratio to each competitor."""
    bounds = limits(device, case.forward.read)
    peaks = {e.competitor.name: [peak_memory(e.thunk(case, False), device), None] for e in entries}
    for e in entries:
        if e.competitor.backward:
            peaks[e.competitor.name][1] = peak_memory(e.thunk(case, True), device)
    forward = paired_medians({e.competitor.name: e.thunk(case, False) for e in entries}, device, repeats)
    both = paired_medians(
        {e.competitor.name: e.thunk(case, True) for e in entries if e.competitor.backward}, device, repeats
    )
    lines = []
    for e in entries:
        name = e.competitor.name
        line = {"op": case.op, "shape": list(case.shape), "dtype": case.dtype, "backend": name, "ours": e.ours}
        line |= speed(case, [forward[name], both.get(name)], bounds)
        line |= {"forward_peak_bytes": peaks[name][0], "both_peak_bytes": peaks[name][1]}
        line |= {"value_error_ratio": e.verdict.value, "gradient_error_ratio": e.verdict.gradient}
        line |= counts(case, e, line["both_ms"], bounds, device)
        if e.ours:
            rivals = [other.competitor.name for other in entries if not other.ours]
            line["versus"] = {
                rival: [forward[rival] / forward[name], both[rival] / both[name] if rival in both else None]
                for rival in rivals
            }
        lines.append(line)
    return lines


def run_case(
    case: Case, names: list[str], device: str, findings: Findings, *, repeats: int, compile: bool, check_only: bool
) -> None:
    """Checks the backends on a case and, unless that is all that is asked, measures those that are right."""
    against = truth(case)
    entries = checked_backends(case, names, against, findings)
    if check_only or (names and not entries):
        return
    entries += running_competitors(case, device, compile, against, findings)
    findings.lines += measure(case, entries, device, repeats)


def default_backends(device) -> list[str]:
    """What can run here, without the reference and without interpreters."""
    return [
        name for name, b in backends.BACKENDS.items()
        if name != "reference" and b.automatic(device) and b.why_not(device) is None
    ]  # fmt: skip
