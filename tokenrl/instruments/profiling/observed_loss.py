"""The first loss of a step: what its ratios are computed from, once the step has ended."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ratios import ByPosition, by_position
from ..record import LOSSES, batch_of
from ..rollout_batch import OF_LOSS

KEPT = {*OF_LOSS, "objective", "on_policy"}  # of the arguments, beside the log-probs


class ObservedLoss:
    """Keeps the arguments of the first call of a loss, with one number or so per token. reason: why it has none."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}
        self.reason: str | None = f"the step called no loss ({', '.join(LOSSES)}) outside of torch.compile"

    def observe(self, function: str, arguments: Mapping[str, Any], result: Any) -> None:
        if function in LOSSES and not self.arguments:
            found = {name: x for name, x in arguments.items() if name in KEPT}
            found |= {"logp": arguments["logp"]} if function == "policy_loss" else _made(arguments, result[1])
            self.arguments = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in found.items()}
            self.reason = None

    def ratios(self) -> ByPosition | None:
        """None where there is a reason."""
        if self.reason is not None:
            return None
        try:
            return by_position(batch_of(self.arguments, {}).to("cpu"))
        except ValueError as error:  # what cannot be put in words: an objective that is in no table
            self.reason = str(error)
            return None


def _made(arguments: Mapping[str, Any], metrics: Any) -> dict[str, Tensor]:
    """The log-probs that linear_policy_loss made, and the mask of their tokens."""
    made = (metrics.logp != 0) | (metrics.token_entropy != 0)
    mask = arguments["mask"]
    return {"logp": metrics.logp, "mask": made if mask is None else made & mask.bool()}
