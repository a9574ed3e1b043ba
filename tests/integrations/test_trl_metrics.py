"""What the mixin logs: its own metrics, and in how many transfers."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

trl = pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

import tokenrl  # noqa: E402
from bench.trl_world import compared, trained  # noqa: E402
from tokenrl.integrations.trl import GRPOTrainer  # noqa: E402
from tokenrl.integrations.trl.loss import MicroBatch, clips_by_position  # noqa: E402
from tokenrl.integrations.trl.metrics import Later, Readings, nanmax, nanmin  # noqa: E402


def test_clips_by_position_are_those_of_the_batch():
    """By hand, from the ratios of an untrained policy to other log-probs."""
    g = torch.Generator().manual_seed(0)
    logp, old = (torch.randn(2, 8, generator=g) / 3 for _ in range(2))
    mask, advantages = torch.arange(8) < torch.tensor([[8], [5]]), torch.tensor([1.0, -1.0])
    trainer = type("Trainer", (), {"use_vllm": False})
    inputs = {"old_per_token_logps": old, "advantages": advantages}
    batch = MicroBatch(inputs, logp, logp, None, mask)
    ratio = (logp - old).exp()
    clipped = torch.where(advantages[:, None] > 0, ratio > 1.2, ratio < 0.8) & mask
    expected = torch.stack([clipped, mask]).view(2, 2, 4, 2).sum((1, 3))
    assert clipped.any()
    torch.testing.assert_close(clips_by_position(trainer, batch, tokenrl.objective("ppo")), expected.double())


class Reads(TorchFunctionMode):
    """Counts where the host reads a number of a tensor."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.item, torch.Tensor.tolist)
        return function(*args, **(kwargs or {}))


class Counted:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.of_losses, self.of_logs = [], []

    def _compute_loss(self, *args):
        with Reads() as reads:
            found = super()._compute_loss(*args)
        self.of_losses.append(reads.count)
        return found

    def log(self, *args):
        with Reads() as reads:
            super().log(*args)
        self.of_logs.append(reads.count)


def test_metrics_are_read_together():
    """In one transfer of each log, TRL's among them; the controller of an adaptive bonus needs its own."""
    options = {"steps": 2, "loss_type": "grpo", "beta": 0.1, "gradient_accumulation_steps": 2}
    theirs = trained(type("CountedTheirs", (Counted, trl.GRPOTrainer), {}), **options)
    assert theirs.of_losses == 4 * [7] and theirs.of_logs == 3 * [0]
    kind = type("CountedOurs", (Counted, GRPOTrainer), {})
    ours = trained(kind, **options)
    assert ours.of_losses == 4 * [0] and ours.of_logs == [1, 1, 0]
    compared(theirs, ours)
    adaptive = trained(kind, steps=2, use_adaptive_entropy=True, entropy_target=3.36, entropy_coef_delta=0.01)
    assert adaptive.of_losses == [1, 1] and adaptive.of_logs == [1, 1, 0]


def test_a_number_that_is_read_later_is_a_float():
    readings = Readings()
    first, second = (
        readings.add(torch.tensor(x, dtype=dtype)) for x, dtype in ((2.5, torch.float32), (-1.0, torch.float64))
    )
    x, y = (Later(lambda reading=reading: reading.tolist()[0]) for reading in (first, second))
    assert f"{x:.1f} {y!r} {round(x)} {-y} {x - y} {3 - x} {x / y} {x**2}" == "2.5 -1.0 2 1.0 3.5 0.5 -2.5 6.25"
    assert sum([x, y]) == 1.5 and y < x and x == 2.5 and x >= 2 and bool(x) and not math.isnan(x)
    assert len({x, 2.5}) == 1
    assert torch.equal(torch.ones(2) * x, torch.full((2,), 2.5)) and torch.equal(
        torch.add(y, torch.ones(1)), torch.zeros(1)
    )
    assert readings.add(torch.arange(3)).tolist() == [0, 1, 2]  # once more after a transfer


def test_extremes_pass_over_nan():
    x = torch.tensor([math.nan, 0.25, 0.0, 1.0])
    assert (nanmin(x), nanmax(x)) == (0, 1)
    assert nanmin(x[:1]).isnan() and nanmax(x[:1]).isnan()
