"""What the tests of instruments share."""

import pytest

from tokenrl.instruments import machine
from tokenrl.instruments.machine_limits import Limits
from tokenrl.instruments.profiling import lines

LIMITS = Limits(read=8e9, copy=2e9, exponentials=1e9, source="made up")
PRODUCTS = 5e9


@pytest.fixture
def known_limits(monkeypatch):
    """Of a machine that does the same at every run, without seconds of measurement."""
    for module in (lines, machine):
        monkeypatch.setattr(module, "limits", lambda device, size=0: LIMITS)
    monkeypatch.setattr(lines, "products", lambda *shape: dict.fromkeys(("logits", "hidden", "weight"), PRODUCTS))
    machine.described_machine.cache_clear()
    yield LIMITS
    machine.described_machine.cache_clear()
