"""How tokenrl inspect writes names and numbers."""

import io
import math

from rich.console import Console

from tokenrl.instruments.inspection import report


def test_long_names_are_cut_in_the_middle():
    name = "an_objective_of_mine_with_a_very_long_name"
    assert report.short("ctpo") == "ctpo" and len(report.short(name)) == report.LONGEST
    assert report.short(name).startswith("an_objective") and report.short(name).endswith("long_name")


def test_numbers_in_few_characters():
    assert [report.number(x) for x in (None, math.nan, 0, 0.01234, 12345, 1e9)] == [
        "-",
        "-",
        "0",
        "0.0123",
        "12,345",
        "1e+09",
    ]
    assert [report.size(x) for x in (16, 2500, 3 * 10**12)] == ["16 B", "2.5 KB", "3,000 GB"]


def test_what_a_terminal_obeys_is_spelled():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    report._wrapped(console, "made \x1b]0;title\x07[bold]b[/bold]\n\x1b[31m")
    assert console.file.getvalue().strip() == r"made \x1b]0;title\x07[bold]b[/bold]\n\x1b[31m"
