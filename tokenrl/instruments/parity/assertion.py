"""assert_parity: a user's loss held to an objective, in a test of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...objectives.policy import Objective
from ..rollout_batch import RolloutBatch, load_batch
from .report import of_loss
from .user_loss import user_loss
from .wording import words


def assert_parity(
    loss: Callable[..., Any], batch: RolloutBatch | str | Path, objective: str | Objective | None = None
) -> None:
    """Asserts that a loss is an objective, value and gradient, by the tolerance rule, in fp32 on a batch.

        def test_my_loss(rollout_batch):  # the fixture comes with tokenrl
            tokenrl.parity.assert_parity(my_loss, rollout_batch, "grpo")

    Args:
        loss: a function that takes what it needs of the batch by name (logits or hidden with weight, else logp; ids,
            old_logp, ref_logp, advantages, mask, cu_seqlens, group_ids, temperature, kl_coef, ..., and the objective's
            parameters, as eps_low) and returns a scalar, or a tuple of which it is the first. The gradient is compared
            by the logits, the hidden states and the head, or the log-probs that it takes.
        batch: of tokenrl.load_batch, the path of one, or tokenrl.parity.random_batch().
        objective: a row or its name; None takes the batch's.

    Raises:
        AssertionError: naming the error, the worst token and, where the numbers are those of a usual mistake, the
            mistake.
        ValueError: where the loss takes what no batch has.
    """
    if not isinstance(batch, RolloutBatch):
        batch = load_batch(batch)
    report = of_loss(user_loss(loss), batch, objective)
    assert report.held, words(report)
