"""The benchmark of a student's loss step: every way has PyTorch's gradients, and one that has others is refused."""

import pytest
import torch

from bench import distill_step, report

CASE = (12, 8, 40, torch.float32)


@pytest.mark.parametrize("row", distill_step.BETAS)
def test_every_way_has_the_gradients_of_pytorch(row, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed (make test installs it)")
    monkeypatch.setattr(distill_step, "TURNS", 1)
    found = distill_step._rows(CASE, row)
    assert [x["way"] for x in found] == ["eager", "TRL", "Liger", "tokenrl", "bare GEMMs"]
    assert all(x["seconds"] > 0 and x["bytes"] > 0 for x in found)
    _, rows = report.distill_table({"distill": found})
    assert [cells[-1] == "-" for cells in rows] == [False, False, False, True, True]


def test_a_way_with_another_gradient_is_refused(monkeypatch):
    right = distill_step.eager
    monkeypatch.setattr(distill_step, "ours", lambda of, row: 1.001 * right(of, distill_step.BETAS[row]))
    with pytest.raises(RuntimeError, match="tokenrl: a gradient is 1.0e-03 from that of PyTorch"):
        distill_step._rows(CASE, "gkd")
