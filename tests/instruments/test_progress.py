"""The progress bar: on a terminal it names what is at work, once, and goes; elsewhere it is silent."""

import pytest

from tokenrl.instruments.progress import tracked


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_names_what_is_at_work(terminal, monkeypatch, capsys):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    monkeypatch.setenv("TERM", "xterm")
    done = [(item, inner) for item in tracked([1, 2], "step {}".format) for inner in tracked("ab", "inner {}".format)]
    assert done == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    shown = capsys.readouterr()
    assert shown.out == "" and ("step 2" in shown.err) == ("2/2" in shown.err) == terminal
    assert "inner" not in shown.err


def test_a_bar_that_breaks_off_leaves_room_for_the_next(monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with pytest.raises(ZeroDivisionError):
        for item in tracked([1, 0]):
            1 / item
    assert list(tracked([3], "next {}".format)) == [3] and "next 3" in capsys.readouterr().err
