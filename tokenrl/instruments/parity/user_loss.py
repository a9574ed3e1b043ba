"""A user's own loss: a function whose parameters are taken by name from a batch, as pytest's fixtures are."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import described, unknown, wrong
from ...objectives.policy import Objective
from ...ops.linear.gemm import linear
from ..rollout_batch import DTYPES, SETTINGS, RolloutBatch
from .computation import HEADS, Outcome, with_leaves, without_head
from .head_rows import scores

LEAVES = (*HEADS, "logp")
ABSENT = {"temperature": 1.0, "logit_scale": 1.0, "kl_coef": 0.0, "entropy_coef": 0.0}  # what a batch without them has
MADE = ("logp", "old_logp", "mask", "objective", "aggregation", "clamp", "cap")  # of any batch
NAMED = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD


def found_by_name(option: str, given: str) -> Any:
    """What MODULE:NAME names; modules of the folder that this runs in are found too."""
    module_name, _, name = given.partition(":")
    if not module_name or not name:
        raise wrong(option, repr(given), "MODULE:NAME, as my_module:my_loss")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise unknown(option, module_name, sorted(path.stem for path in Path.cwd().glob("*.py"))) from None
    if not hasattr(module, name):
        raise unknown(option, name, [key for key, x in vars(module).items() if callable(x) and key[0] != "_"])
    return getattr(module, name)


@dataclass(frozen=True)
class UserLoss:
    """function(...) -> a scalar, or a tuple of which it is the first."""

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]

    def leaf_batch(self, batch: RolloutBatch) -> RolloutBatch:
        """The batch as a function of what the loss takes: of its head, of the logits or of the log-probs in fp32."""
        if "logits" in self.parameters and "hidden" in batch.tensors:
            dtype = torch.promote_types(batch.tensors["hidden"].dtype, torch.float32)
            head = batch.cast(dtype).tensors
            return without_head(batch, logits=linear(head["hidden"], head["weight"], head.get("bias")))
        if any(name in self.parameters for name in HEADS):
            return batch
        logp, entropy = scores(batch, torch.float32)
        return without_head(batch, logp=logp, **({} if entropy is None else {"entropy": entropy}))

    def leaves(self, batch: RolloutBatch) -> tuple[str, ...]:
        """What of the batch gradients are taken by: what the loss takes of a head, or the log-probs."""
        found = tuple(name for name in LEAVES if name in self.parameters and name in batch.tensors)
        return found if len(found) == 1 else tuple(name for name in found if name != "logp")

    def outcome(self, batch: RolloutBatch) -> Outcome:
        """Value and gradients, in the batch's precision. The loss works on copies."""
        leaves = self.leaves(batch)
        batch = with_leaves(batch, leaves)
        loss = self._scalar(self._called(self._taken(batch, batch.objective)))
        given = [batch.tensors[name] for name in leaves]
        found = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
        return Outcome(loss.detach().to(given[0].dtype), dict(zip(leaves, found, strict=True)))

    def check_names(self, row: Objective) -> None:
        """A parameter that no batch has raises, naming the nearest; so does nothing to differentiate by."""
        known = {*_parameters(row), *MADE, *ABSENT, *DTYPES, *SETTINGS}
        for name, parameter in self.parameters.items():
            if name not in known and parameter.default is inspect.Parameter.empty:
                raise unknown(f"parameter of {self.name}", name, sorted(known))
        if not self.parameters.keys() & {*LEAVES}:
            taken = ", ".join(self.parameters) or "none"
            raise wrong(f"parameters of {self.name}", taken, "logits, hidden and weight, or logp among them")

    def _taken(self, batch: RolloutBatch, row: Objective) -> dict[str, Any]:
        """What the batch has by the names of the parameters; the objective's own and defaults where it has nothing."""
        taken, own = {}, _parameters(row)
        for name, parameter in self.parameters.items():
            if name in batch.tensors or name in batch.settings:
                taken[name] = _value(name, batch, row)
            elif parameter.default is inspect.Parameter.empty:
                if name not in {*own, *MADE, *ABSENT}:
                    raise wrong(name, None, f"a batch that has it, since {self.name} takes it")
                taken[name] = own[name] if name in own else _value(name, batch, row)
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in taken.items()}

    def _called(self, arguments: Mapping[str, Any]) -> Any:
        first = [x for name, x in arguments.items() if self.parameters[name].kind not in NAMED]
        try:
            return self.function(*first, **{k: x for k, x in arguments.items() if self.parameters[k].kind in NAMED})
        except Exception as error:
            raise RuntimeError(f"{self.name} raised {type(error).__name__}: {error}") from error

    def _scalar(self, result: Any) -> Tensor:
        loss = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            accepted = "a scalar tensor, or a tuple of which it is the first"
            raise wrong(f"result of {self.name}", described(loss), accepted)
        if not loss.requires_grad:
            raise wrong(f"result of {self.name}", "a tensor without a graph", "one that depends on the batch")
        return loss.reshape(())


def user_loss(function: Callable[..., Any]) -> UserLoss:
    """ValueError where it is no function, or takes nothing that a gradient is taken by."""
    if not callable(function):
        raise wrong("loss", described(function), "a function, whose parameters are taken from the batch by name")
    name = getattr(function, "__name__", type(function).__name__)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters
    return UserLoss(name, function, {key: p for key, p in parameters.items() if p.kind not in variadic})


def _parameters(row: Objective) -> dict[str, Any]:
    return {name: getattr(part, name) for part in row.parts.values() for name in part.names}


def _value(name: str, batch: RolloutBatch, row: Objective) -> Any:
    """What a loss gets for a parameter: the batch's own, or what stands for it."""
    if name == "logp" and batch.leaf != "logp":
        return batch.log_probs("reference")
    known = {**ABSENT, **batch.settings, **batch.tensors}
    if name in known:
        return known[name]
    if name == "mask":
        return torch.ones_like(batch.tokens, dtype=torch.bool)
    if name == "old_logp":
        return batch.log_probs("reference").detach()
    return row if name == "objective" else getattr(row, name)
