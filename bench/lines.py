"""The measured lines of a case: times, peaks and errors of its entries, beside the limit."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tokenrl.instruments.machine_limits import Limits, limits

from . import measure
from .case import Case
from .check import Verdict
from .competitors import Competitor, first_line
from .linear_cases import bare_gemms
from .measure import host_syncs, launches, paired_samples, peak_memory, thunk

BARE = "bare GEMMs"
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Entry:
    """One call of a case that may be timed."""

    competitor: Competitor
    verdict: Verdict
    ours: bool

    @property
    def name(self) -> str:
        return self.competitor.name

    def thunk(self, case: Case, backward: bool) -> Callable[[], object] | None:
        """None: it has no forward, or no backward, of its own."""
        there = self.competitor.backward if backward else self.competitor.forward
        return thunk(case, self.competitor.call, backward) if there else None


def peaks_of(
    case: Case, entries: list[Entry], device: str, remark: Callable[[Case, str, str], None]
) -> dict[str, list[int | None]]:
    """Bytes of forward and of forward plus backward. A competitor that the whole case stops becomes a remark."""
    found = {}
    for e in entries:
        try:
            calls = [e.thunk(case, backward) for backward in (False, True)]
            found[e.name] = [None if call is None else peak_memory(call, device) for call in calls]
        except Exception as error:  # most likely out of memory, which a smaller case did not show
            if e.ours:
                raise
            remark(case, e.name, first_line(error))
    return found


def median(samples: Samples, name: str) -> float | None:
    return statistics.median(samples[name]) if name in samples else None


def over(taken: float | None, ours: float | None) -> float | None:
    return None if taken is None or ours is None else taken / ours


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


def gemm_speed(case: Case, medians: list[float | None], bare: list[float], share: float) -> dict:
    """As speed, of a case whose limit is the bare GEMMs, of the active tokens' share; and the time over that of all."""
    line = {}
    for key, taken, limit, count in zip(("forward", "both"), medians, bare, case.gemms.counts, strict=True):
        line[f"{key}_limit"] = "GEMM" if count == 1 else f"{count} GEMMs"
        line[f"{key}_limit_ms"] = 1e3 * limit * share
        line[f"{key}_ms"] = None if taken is None else 1e3 * taken
        line[f"{key}_gflops"] = None if taken is None else count * case.gemms.flops * share / taken / 1e9
        line[f"{key}_percent"] = None if taken is None else 100 * limit * share / taken
        line[f"{key}_over_gemms"] = over(taken, limit)
    return line


def counts(case: Case, entry: Entry, both_ms: float | None, bounds: Limits, device: str) -> dict:
    """What only the objectives are asked for: bytes per token, launches and host syncs of forward and backward."""
    if case.op != "policy_loss":
        return {}
    call, tokens = entry.thunk(case, True), case.inputs[0].numel()
    opaque = device == "cpu" and entry.name == "compile"  # its loops are no ops
    return {
        "model_bytes_per_token": (case.forward.bytes + case.backward.bytes) / tokens,
        "time_as_bytes_per_token": None if both_ms is None else both_ms / 1e3 * bounds.copy / tokens,
        "launches": None if opaque else launches(call, device),
        "host_syncs": host_syncs(call, device),
    }


def sampled(case: Case, entries: list[Entry], device: str, repeats: int) -> list[Samples]:
    """Seconds of the forward and of forward plus backward, the bare GEMMs taking turns with the entries."""
    bare = bare_gemms(case) if case.gemms else ()
    rivals = frozenset(e.name for e in entries if not e.ours)
    found = []
    for backward in (False, True):
        calls = {BARE: bare[backward]} if bare else {}
        for call in calls.values():
            call()
        calls |= {e.name: call for e in entries if (call := e.thunk(case, backward)) is not None}
        found.append(paired_samples(calls, device, repeats, rivals))
    return found


def described(case: Case, name: str, ours: bool, samples: list[Samples]) -> dict:
    spec = case.spec
    line = {"op": spec.op, "shape": list(spec.shape), "dtype": spec.dtype, "variant": spec.variant}
    return line | {"backend": name, "ours": ours, "samples": [len(part.get(name, ())) for part in samples]}


def bare_line(case: Case, samples: list[Samples]) -> dict:
    medians = [median(part, BARE) for part in samples]
    line = described(case, BARE, False, samples) | gemm_speed(case, medians, medians, 1.0)
    nothing = ("forward_peak_bytes", "both_peak_bytes", "value_error_ratio", "gradient_error_ratio")
    return line | dict.fromkeys(nothing)


def measured(
    case: Case, entries: list[Entry], device: str, repeats: int, remark: Callable[[Case, str, str], None]
) -> list[dict]:
    """One line per entry, the bare GEMMs first, then ours; ours with the ratio to each competitor."""
    peaks = peaks_of(case, entries, device, remark)
    entries = [e for e in entries if e.name in peaks]
    samples = sampled(case, entries, device, repeats)
    bounds = None if case.gemms else limits(device, case.forward.read)
    bare = [median(part, BARE) for part in samples]
    lines = [bare_line(case, samples)] if case.gemms else []
    for e in entries:
        medians = [median(part, e.name) for part in samples]
        line = described(case, e.name, e.ours, samples)
        line |= gemm_speed(case, medians, bare, case.gemms.share) if case.gemms else speed(case, medians, bounds)
        line |= dict(zip(("forward_peak_bytes", "both_peak_bytes"), peaks[e.name], strict=True))
        line |= {"value_error_ratio": e.verdict.value, "gradient_error_ratio": e.verdict.gradient}
        line |= counts(case, e, line["both_ms"], bounds, device)
        if e.ours:
            rivals = [other.name for other in entries if not other.ours]
            line["versus"] = {
                rival: [over(median(part, rival), taken) for part, taken in zip(samples, medians, strict=True)]
                for rival in rivals
            }
        elif 1 in line["samples"]:
            remark(case, e.name, f"a call takes over {measure.SLOW_SECONDS:g} s: timed once")
        lines.append(line)
    return lines
