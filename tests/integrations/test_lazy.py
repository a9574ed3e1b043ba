"""What waits for a module of a host."""

import importlib.util
import sys

import pytest

from tokenrl.integrations import lazy


@pytest.fixture
def waited_for(tmp_path, monkeypatch):
    """The folder of a module that is not imported yet."""
    (tmp_path / "a_host.py").write_text("VALUE = 3")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lazy, "_waiting", {})
    yield str(tmp_path)
    sys.modules.pop("a_host", None)


def finders():
    return [finder for finder in sys.meta_path if isinstance(finder, lazy._Import)]


def test_it_survives_a_look_at_the_spec(waited_for):
    seen = []
    lazy.when_imported("a_host", seen.append)
    lazy.when_imported("a_host", seen.append)
    (finder,) = finders()
    assert finder.find_spec("another.module", [waited_for]) is None
    for _ in range(2):
        spec = finder.find_spec("a_host", [waited_for])
    assert not seen
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert seen == [module, module] and not finders()


def test_once_imported_nothing_waits(waited_for):
    values = []
    lazy.when_imported("a_host", lambda module: values.append(module.VALUE))
    lazy.when_imported("no_such_host", values.append)
    import a_host

    assert values == [3] and len(finders()) == 1  # the other still waits
    lazy.when_imported("a_host", lambda module: values.append(module))
    assert values == [3, a_host]
