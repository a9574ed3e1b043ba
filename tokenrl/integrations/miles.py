"""miles 0.1, slime's fork: `--loss-type custom_loss --custom-loss-function-path tokenrl.integrations.miles.loss`.

TOKENRL_OBJECTIVE names a row of tokenrl's table; without it the objective is that of --advantage-estimator.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from .custom_loss import Loss, evaluate, row_of
from .hosts import check_parameters, chosen_objective, require

require("miles")
chosen_objective("miles", {})
HOST = import_module("miles.backends.training_utils.loss_hub.losses")


def loss(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]) -> Loss:
    """miles's custom loss: (loss, metrics), 0-d, sums over the samples of a micro-batch."""
    row = row_of("miles", args, 20.0)
    return evaluate(row, HOST, args, batch, logits, sum_of_sample_mean)


check_parameters("miles's policy_loss_function", HOST.policy_loss_function, loss)
