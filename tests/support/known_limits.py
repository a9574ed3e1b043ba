"""A machine whose limits are known, in place of seconds of measurement."""

import pytest


@pytest.fixture
def known_limits(monkeypatch):
    """Of a machine that does the same at every run."""
    from tokenrl.instruments import machine
    from tokenrl.instruments.machine_limits import Limits
    from tokenrl.instruments.profiling import lines

    limits, products = Limits(read=8e9, copy=2e9, exponentials=1e9, source="made up"), 5e9
    for module in (lines, machine):
        monkeypatch.setattr(module, "limits", lambda device, size=0: limits)
    monkeypatch.setattr(lines, "products", lambda *shape: dict.fromkeys(("logits", "hidden", "weight"), products))
    machine.described_machine.cache_clear()
    yield limits
    machine.described_machine.cache_clear()
