"""TRL's GRPOTrainer with its head and its loss by tokenrl.

TRL computes the metrics it logs itself, without gradients, from the log-probs that are there already; its loss is what
ours is held to.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import utils

from ...batch.checks import check_name
from ...errors import wrong
from ...objectives.policy import Objective, find_objective
from ..hosts import needed_by
from .head import fused_head
from .loss import QUARTERS, MicroBatch, clips_by_position, host_objective, loss_of
from .metrics import Later, Readings, read_later, share
from .one_pass import OnePass, inside, what_prevents

HEADS = ("auto", "one-pass", "hidden", "loss")
PARITY = ("first", "always", "never")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# What TRL's GRPOTrainer hands to the model beside ids and mask.
PASSED_ON = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
# Metrics of TRL's own loss_type, which say nothing of another objective.
OF_LOSS_TYPE = ("clip_ratio/", "cispo_clip_ratio", "vespo/", "policy_loss")


@dataclass(frozen=True)
class TokenRLConfig:
    """objective: None for TRL's loss_type, with TRL's numbers; a name of tokenrl's table or an Objective trains with
    that, aggregated as TRL's loss_type is.
    head: "one-pass" the loss and its gradients straight from hidden states, 6 N D V flops, where the settings allow it;
    "hidden" log-probs from hidden states without logits, 8 N D V (both trl 1.15 and later); "loss" TRL's own head;
    "auto" the first of these that is possible.
    parity: "first" runs TRL's own loss beside the first micro-batch and raises where they differ; "always", "never".
    """

    objective: str | Objective | None = None
    head: str = "auto"
    parity: str = "first"

    def __post_init__(self) -> None:
        check_name("head", self.head, HEADS)
        check_name("parity", self.parity, PARITY)
        row = None if self.objective is None else find_objective(self.objective)
        if row is not None and (needs := needed_by(row)):
            raise wrong("objective", f"{row.name!r}, which needs {needs}", "a row of what TRL hands to a loss")


def config_of(trainer: Any, given: TokenRLConfig | None) -> TokenRLConfig:
    found = given if given is not None else getattr(trainer.args, "tokenrl", None) or TokenRLConfig()
    if not isinstance(found, TokenRLConfig):
        raise wrong("tokenrl", type(found).__name__, "a TokenRLConfig")
    return found


def check_trainer(trainer: Any) -> None:
    """unsloth writes TRL's trainers anew and would drop what is overridden here."""
    if any("Unsloth" in base.__name__ or "unsloth" in base.__module__ for base in type(trainer).__mro__):
        raise wrong("trainer", "unsloth's generated GRPOTrainer", "TRL's own (import unsloth after it, or not at all)")


def depth_of(trainer: Any, head: str, row: Objective) -> str:
    """The head that was asked for, or for "auto" the deepest whose numbers are TRL's."""
    if not hasattr(utils, "add_fused_lm_head"):
        if head in ("one-pass", "hidden"):
            raise wrong("head", f"{head!r} with trl {trl.__version__}", "'loss'; the others from trl 1.15.0 on")
        return "loss"
    if is_deepspeed_zero3_enabled():
        if head in ("one-pass", "hidden"):
            raise wrong("head", f"{head!r} with DeepSpeed's ZeRO-3, which partitions it", "'loss', or a smaller stage")
        return "loss"
    reason = what_prevents(trainer, row)
    if head == "one-pass" and reason:
        raise wrong("head", f"'one-pass' with {reason}", "'hidden', which has its numbers")
    return ("hidden" if reason else "one-pass") if head == "auto" else head


class TokenRLMixin:
    """Before a GRPOTrainer among the bases: class Mine(TokenRLMixin, MyTrainer). Keyword tokenrl: a TokenRLConfig; or
    as args.tokenrl."""

    accelerator: Any
    aux_loss_enabled: bool
    model: Any
    _metrics: Any

    def __init__(self, *args: Any, tokenrl: TokenRLConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_trainer(self)
        self._tokenrl = config_of(self, tokenrl)
        chosen = self._tokenrl.objective
        self._is_hosts = chosen is None
        self._row = host_objective(self) if chosen is None else find_objective(chosen)
        self._depth = depth_of(self, self._tokenrl.head, self._row)
        self._known: tuple[Any, ...] | None = None  # what TRL's own loss is given while it makes its metrics
        self._compared = False
        self._readings = Readings()

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if self._known is not None:
            return self._known
        with fused_head(self._depth != "loss"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)  # type: ignore[misc]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        if self._depth == "one-pass":
            sharded = any(isinstance(module, FSDPModule) for module in model.modules())
            one_pass = OnePass(self, inputs, mask, self._row, sharded)
            with inside(one_pass):
                batch = self._micro_batch(model, inputs, mask)
            loss, metrics = one_pass.loss_through(batch.logp), one_pass.metrics
        else:
            batch = self._micro_batch(model, inputs, mask)
            loss, metrics = loss_of(self, batch, self._row)
        theirs = self._host_loss(model, batch)
        if self._is_hosts:
            self._compare(model, batch, loss.detach(), theirs)
        self._log_ours(metrics, batch)
        return loss

    def _micro_batch(self, model: Any, inputs: dict[str, Any], mask: Tensor) -> MicroBatch:
        ids = inputs["completion_ids"]
        both = (torch.cat([inputs[f"prompt_{key}"], inputs[f"completion_{key}"]], 1) for key in ("ids", "mask"))
        logp, entropy, auxiliary = self._get_per_token_logps_and_entropies(
            model, *both, ids.shape[1], compute_entropy=True, compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in PASSED_ON},
        )  # fmt: skip
        return MicroBatch(inputs, logp, entropy, auxiliary, mask)

    def _host_loss(self, model: Any, batch: MicroBatch) -> Tensor:
        """TRL's loss, without gradient, of the log-probs that are there; logs TRL's metrics."""
        self._known = (batch.logp.detach(), batch.entropy.detach(), batch.auxiliary)
        with torch.no_grad(), read_later(self._readings):
            return self._hosts(model, batch.inputs)

    def _hosts(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        try:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        finally:
            self._known = None

    def _worst_token(self, model: Any, batch: MicroBatch) -> str:
        """Where the two losses have gradients by the log-probs that differ most."""
        gradients = []
        with torch.enable_grad():
            for loss_by in (
                lambda leaf: loss_of(self, leaf, self._row)[0],
                lambda leaf: self._hosts(model, leaf.inputs),
            ):
                leaf = replace(batch, logp=batch.logp.detach().requires_grad_(), entropy=batch.entropy.detach())
                self._known = (leaf.logp, leaf.entropy, leaf.auxiliary)
                gradients.append(torch.autograd.grad(loss_by(leaf), leaf.logp)[0])
        row, token = divmod(int((gradients[0] - gradients[1]).abs().argmax()), batch.logp.shape[1])
        ours, theirs = (gradient[row, token] for gradient in gradients)
        return f"most at token {token} of completion {row}, of gradient {ours:.4g} and {theirs:.4g}"

    def _compare(self, model: Any, batch: MicroBatch, loss: Tensor, theirs: Tensor) -> None:
        if self._tokenrl.parity == "never" or (self._compared and self._tokenrl.parity == "first"):
            return
        self._compared = True
        if not torch.allclose(loss, theirs.to(loss.dtype), **TOLERANCE, equal_nan=True):
            accepted = f"a relative difference of {TOLERANCE['rtol']} (parity='never' trains all the same)"
            both = f"{loss:.6g} from tokenrl, {theirs:.6g} from trl {trl.__version__}"
            raise wrong("loss", f"{both}, {self._worst_token(model, batch)}", accepted)

    def _log_ours(self, metrics: Any, batch: MicroBatch) -> None:
        logged = self._metrics["train" if self.model.training else "eval"]
        if not self._is_hosts:
            for name in [name for name in logged if name.startswith(OF_LOSS_TYPE)]:
                del logged[name]
        found = copy.copy(metrics.reduce())
        found.raw = self._readings.add(found.raw)
        for name in found.NAMES:
            logged[f"tokenrl/{name}"].append(Later(partial(getattr, found, name)))
        if self._row.form is None:
            counts = self._readings.add(self.accelerator.reduce(clips_by_position(self, batch, self._row), "sum"))
            for at in range(QUARTERS):
                logged[f"tokenrl/clip_by_position/{at + 1}"].append(Later(partial(share, counts, at, at + QUARTERS)))
        self._readings.pack()


class GRPOTrainer(TokenRLMixin, trl.GRPOTrainer):
    """trl.GRPOTrainer whose head and loss are tokenrl's."""
