"""slime 0.3: `--loss-type custom_loss --custom-loss-function-path tokenrl.integrations.slime.loss`.

TOKENRL_OBJECTIVE names a row of tokenrl's table; without it the objective is that of --advantage-estimator.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from .custom_loss import Loss, evaluate, row_of
from .hosts import check_parameters, chosen_objective, require

require("slime")
chosen_objective("slime", {})
HOST = import_module("slime.backends.megatron_utils.loss")


def loss(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Callable[[Tensor], Tensor]) -> Loss:
    """slime's custom loss: (loss, metrics), 0-d, sums over the samples of a micro-batch."""
    row = row_of("slime", args, math.inf)
    return evaluate(row, HOST, args, batch, logits, sum_of_sample_mean)


check_parameters("slime's policy_loss_function", HOST.policy_loss_function, loss)
