"""Threads share long sequences in tiles of fixed places: neither their number nor the batch changes a bit."""

import pytest
import torch
from cases import gates_under_test, run

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.ops import backends

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].why_not(torch.device("cpu")) is not None, reason="the C++ library is not built"
)
WIDTH = 3 * 4096 + 777  # three tiles of csrc/cpu/objective_tiles.h and a piece of a fourth
STREAMED = [("token", "through"), ("prefix_sum", "local"), ("prefix_mean", "local"), ("prefix_min", "local")]
WHOLE = [("prefix_mean", "through"), ("span_mean", "through")]


def batch():
    g = torch.Generator().manual_seed(4)
    logp = -torch.rand(2, WIDTH, generator=g) * 3
    old_logp = logp + 0.02 * torch.randn(2, WIDTH, generator=g)
    mask = torch.rand(2, WIDTH, generator=g) > 0.1
    mask[0, :1500] = mask[1, 9000:] = False  # padding in whole blocks, a hole in one, a tile without tokens
    mask[0, 5000:6100] = False
    return logp, old_logp, torch.tensor([1.0, -0.5]), mask


def evaluated(threads, objective, logp, old_logp, advantages, mask):
    """(loss, gradient, metrics) on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    logp = logp.clone().requires_grad_()
    loss, metrics = tokenrl.policy_loss(objective, logp, old_logp, advantages, mask=mask, backend="cpu")
    grad = torch.autograd.grad(loss, logp)[0]
    torch.set_num_threads(before)
    return loss.detach(), grad, metrics.raw


@pytest.mark.parametrize("statistic,flow", STREAMED + WHOLE)
def test_threads_and_other_sequences_change_no_bit(statistic, flow):
    gate = gates_under_test()["log_band"]
    objective = tokenrl.Objective("made", statistic, gate, "token-sum", "test", flow=flow, cap=1.0)
    inputs = batch()
    both = evaluated(1, objective, *inputs)
    assert all(torch.equal(x, y) for x, y in zip(both, evaluated(2, objective, *inputs), strict=True))
    for row in range(2):  # of one sequence the second thread begins in the middle
        own = [x[row : row + 1] for x in inputs]
        alone = evaluated(1, objective, *own)
        assert torch.equal(alone[1][0], both[1][row])
        assert all(torch.equal(x, y) for x, y in zip(alone, evaluated(2, objective, *own), strict=True))


@pytest.mark.parametrize("statistic,flow", STREAMED)
def test_tiles_are_right(statistic, flow):
    """Of a gate without edges, which among so many tokens some would meet."""
    objective = tokenrl.Objective("made", statistic, gates_under_test()["ratio"], "token-mean", "test", flow=flow)
    logp, old_logp, advantages, mask = batch()
    case = {"logp": logp.double(), "old_logp": old_logp.double(), "advantages": advantages.double(), "mask": mask}
    truth, base = (run(objective, case, "reference", dtype) for dtype in (torch.float64, torch.float32))
    found = run(objective, case, "cpu", torch.float32)
    for what, *values in zip(("loss", "gradient"), found, truth, base, strict=False):
        close(*values, what=what)
