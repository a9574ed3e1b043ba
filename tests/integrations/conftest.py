"""What the tests of a host share."""

import gc
import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """accelerate collects garbage twice in each run of a trainer: among what lives, not what hosts made on import."""
    gc.freeze()


@pytest.fixture
def core(monkeypatch):
    """verl's core_algos as if it were imported, with all that this process registers in it."""
    import verl_source

    from tokenrl.integrations import verl
    from tokenrl.integrations.verl import settings

    module = verl_source.core_algos()
    monkeypatch.setitem(sys.modules, verl_source.CORE, module)
    settings.register_table({})
    yield module
    verl.restore()
