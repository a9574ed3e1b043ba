"""One case: every backend checked, then timed beside its competitors."""

from dataclasses import dataclass, field

from tokenrl.ops import backends

from .case import Case
from .check import Truth, Verdict, truth, verdict
from .competitors import Competitor, competitors, first_line
from .linear_competitors import linear_competitors
from .lines import Entry, measured


@dataclass
class Findings:
    """lines: what was measured. missing: (case, competitor, reason), remarks too. failures: wrong backends. passed:
    right ones."""

    lines: list[dict] = field(default_factory=list)
    missing: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    def remark(self, case: Case, competitor: str, reason: str) -> None:
        self.missing.append({"case": case.name, "competitor": competitor, "reason": reason})


def our_call(case: Case, name: str) -> Competitor:
    return Competitor(name, lambda *inputs: case.run(name, *inputs))


def checked_backends(case: Case, names: list[str], against: Truth, findings: Findings) -> list[Entry]:
    """The backends whose results are right; the others become failures."""
    entries = []
    for name in names:
        mine = our_call(case, name)
        try:
            found = verdict(case.held, mine.call, against)
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
    for rival in (linear_competitors if case.gemms else competitors)(case, device, compile):
        reason, found = rival.reason, Verdict(None, None, None)
        if rival.call is not None and rival.comparable:
            try:
                if rival.backward:
                    found = verdict(case.held, rival.call, against, strict=False)
                else:
                    rival.call(*case.held.inputs)
            except Exception as error:  # whatever stops somebody else's code is the reason
                reason = first_line(error)
        if reason or rival.remark:
            findings.remark(case, rival.name, reason or rival.remark)
        if not reason:
            entries.append(Entry(rival, found, False))
    return entries


def run_case(
    case: Case, names: list[str], device: str, findings: Findings, *, repeats: int, compile: bool, check_only: bool
) -> None:
    """Checks the backends on a case and, unless that is all that is asked, measures those that are right."""
    against = truth(case.held)
    entries = checked_backends(case, names, against, findings)
    if check_only or (names and not entries):
        return
    entries += running_competitors(case, device, compile, against, findings)
    del against
    findings.lines += measured(case, entries, device, repeats, findings.remark)


def default_backends(device) -> list[str]:
    """What can run here, without the reference and without interpreters."""
    return [
        name for name, b in backends.BACKENDS.items()
        if name != "reference" and b.automatic(device) and b.why_not(device) is None
    ]  # fmt: skip
