"""One forward of a fused model with labels."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from ...errors import wrong
from ...logprobs.from_hidden import head_dtype, linear_token_logprobs
from ...logprobs.from_logits import DTYPES, IGNORED, OUTPUTS
from ..heads import check_weight, local_rows
from ..hosts import instead
from .logits import Logits, StandIn


@dataclass(frozen=True)
class FusedHead:
    """What fuse_lm_head was told, and the forward that the model had."""

    before: Callable[..., Any]
    outputs: tuple[str, ...]
    compute_dtype: torch.dtype | None
    options: dict[str, Any] | None  # None: undone, the forward that was there


def check_head(model: Any) -> nn.Linear:
    """The head, checked."""
    named = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise wrong(
            "model", f"{named}, which has no get_output_embeddings()", "a causal LM of transformers with a head"
        )
    if model.loss_function is not ForCausalLMLoss:
        loss = getattr(model.loss_function, "__name__", model.loss_function)
        raise wrong("model", f"{named} with the loss {loss}", "ForCausalLMLoss")
    if "peft" in type(head).__module__:
        accepted = "a head without adapter (leave lm_head out of target_modules and modules_to_save, or merge)"
        raise wrong("lm_head", f"a PEFT adapter ({type(head).__name__})", accepted)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise wrong("lm_head", f"a {type(head).__name__}", "torch.nn.Linear, whose weight is read directly")
    if head.weight.dtype not in DTYPES:
        raise wrong("lm_head.weight", f"dtype {head.weight.dtype}", ", ".join(map(str, DTYPES)))
    check_weight(head.weight)
    return head


@dataclass
class LabelledCall:
    """One forward with labels."""

    model: Any
    fused: FusedHead
    head: nn.Linear = field(init=False)
    stats: dict[str, Tensor] = field(init=False, default_factory=dict)

    @torch.compiler.disable(recursive=False)
    def run(self, given: dict[str, Any]) -> Any:
        self.head = check_head(self.model)
        with instead(self.model, "_loss_function", self.loss):
            self.model.set_output_embeddings(StandIn(self.head))
            try:
                found = self.fused.before(**given)
            finally:
                self.model.set_output_embeddings(self.head)
        if not self.stats:
            raise self.refused("without a call of its loss_function")
        if not isinstance(found, ModelOutput):
            raise wrong("return_dict", False, "True with labels")
        own = {name: value for name, value in found.items() if not isinstance(value, Logits)}
        return with_statistics(found.__class__)(**own, **self.stats)

    @torch.compiler.disable(recursive=False)
    def loss(
        self, logits: Any, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None,
        ignore_index: int = IGNORED, shift_labels: Tensor | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """In the place of ForCausalLMLoss; like it, it passes over what else a forward was given."""
        if not isinstance(logits, Logits):
            raise self.refused("with logits that are not its head's")
        if self.stats:
            raise self.refused("with several losses")
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        hooked = hasattr(self.head, "_hf_hook")  # accelerate's, of a device map: it wraps the forward
        scored = functools.partial(self.statistics, logits.softcap, logits.logit_scale, ignore_index)
        with instead(self.head, "_old_forward" if hooked else "forward", scored):
            found = self.head(logits.hidden, shift_labels)
        self.stats = dict(zip(self.fused.outputs, found, strict=True))
        count = (shift_labels != ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return -found[0].sum() / (count.to(found[0].device) if isinstance(count, Tensor) else count)

    def statistics(
        self, softcap: float | None, logit_scale: float, ignore_index: int, hidden: Tensor, ids: Tensor
    ) -> tuple[Tensor, ...]:
        """The head's forward, within its module's call, where FSDP has gathered the weight, and in the place of tensor
        parallelism's forward, which would gather logits."""
        weight, bias, on_ranks = local_rows(self.head.weight, self.head.bias)
        found = linear_token_logprobs(
            hidden, weight, ids.to(hidden.device), bias=bias, softcap=softcap,
            logit_scale=logit_scale, ignore_index=ignore_index, outputs=self.fused.outputs,
            compute_dtype=self.fused.compute_dtype or head_dtype(hidden), **(self.fused.options or {}), **on_ranks,
        )  # fmt: skip
        return tuple(x.clone() for x in found)  # the hooks of FSDP2 warn of views

    def refused(self, what: str) -> ValueError:
        return wrong(
            "model", f"{type(self.model).__name__}, a forward {what}", "one that scores its lm_head's logits once"
        )


@functools.cache
def with_statistics(kind: Any) -> Any:
    """A model's output that has room for statistics."""
    return make_dataclass(f"Fused{kind.__name__}", [(name, Any, None) for name in OUTPUTS], bases=(kind,))
