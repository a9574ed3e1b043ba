"""The account at the end of a run: tests by outcome, skips by reason, golden cases by family.

Each test hands over the cases it read with its report, which xdist carries to the process that prints.
"""

import collections
import textwrap

import golden_data
import pytest

GOLDEN_CASE, SHOWN = "golden case", "shown"  # SHOWN: what a test wants to have printed with the account


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call":
        item.user_properties += [(GOLDEN_CASE, case) for case in golden_data.READ]
    golden_data.READ.clear()


def golden_cases(reports) -> dict[str, set]:
    """The cases that tests read and passed with, by family; a case on several backends is one."""
    cases = collections.defaultdict(set)
    for report in reports:
        for key, value in report.user_properties:
            if key == GOLDEN_CASE:
                family, case = value
                cases[family].add(case)
    return cases


def pytest_terminal_summary(terminalreporter):
    found = terminalreporter.stats
    outcomes = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    counts = {outcome: len(found[outcome]) for outcome in outcomes if found.get(outcome)}
    for report in [*found.get("passed", []), *found.get("failed", [])]:
        for text in (value for key, value in report.user_properties if key == SHOWN and report.when == "call"):
            terminalreporter.section(report.nodeid, sep="-")
            terminalreporter.line(text)
    terminalreporter.section("account")
    terminalreporter.line(f"{sum(counts.values())} tests: {', '.join(f'{n} {o}' for o, n in counts.items())}")
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in found.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5} skipped: {reason}")
    cases = golden_cases(found.get("passed", []))
    if not cases:
        return
    recorded = {family: len(entry["cases"]) for family, entry in golden_data.INDEX.items()}
    read = {family: len(cases[family]) for family in sorted(recorded)}
    terminalreporter.line(f"golden cases: {sum(read.values())} of {sum(recorded.values())} in {len(recorded)} families")
    families = ", ".join(f"{family}\xa0{count}\xa0of\xa0{recorded[family]}" for family, count in read.items())
    for line in textwrap.wrap(families, 118, initial_indent="  ", subsequent_indent="  "):
        terminalreporter.line(line.replace("\xa0", " "))
