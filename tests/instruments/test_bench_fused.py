"""The table of fused gates beside built-in ones."""

import pytest
from registered import restored

from bench import fused
from bench.report import fused_table
from tokenrl.fusion.building import why_not_cpp


@pytest.mark.skipif(why_not_cpp() is not None, reason=str(why_not_cpp()))
def test_fused_gates_stand_beside_built_in_ones(monkeypatch):
    for name, small in {"PLAIN": {"ctpo": fused.PLAIN["ctpo"]}, "ROWS": 2, "WIDTH": 8, "ROUNDS": 1}.items():
        monkeypatch.setattr(fused, name, small)
    with restored():
        found = fused.measure()
    head, [row] = fused_table({"fused": found})
    assert len(head) == len(row) and row[0] == "ctpo" and all(float(number.replace(",", "")) > 0 for number in row[1:])
    assert row[-1] == f"{found['ctpo']['fused'] / found['ctpo']['built in']:.2f}"
