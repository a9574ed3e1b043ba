"""Objectives and gates that a test registers."""

from contextlib import contextmanager

import tokenrl
from tokenrl.objectives.gates import GATES
from tokenrl.ops import backends

TABLES = (GATES, backends.TRITON_GATES, backends.CPU_GATES, backends.NOT_FUSED, tokenrl.OBJECTIVES)


@contextmanager
def restored():
    """What is registered inside is taken out again."""
    before = [dict(table) for table in TABLES]
    try:
        yield
    finally:
        for table, old in zip(TABLES, before, strict=True):
            table.clear()
            table.update(old)
