"""A causal LM called with labels returns per-token statistics instead of logits.

The model's own forward runs, with a stand-in where its head is. What it does to the stand-in's result (a scale, a
softcap) is noted, anything else is refused by name; where it calls its loss, the head's own module is called on the
hidden states and labels, and computes linear_token_logprobs in its forward. So no table of model types says what a
model does to its logits, and the hooks of FSDP, of a device map and of autocast see the head as they always do.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch

from ...logprobs.from_hidden import linear_token_logprobs
from .call import FusedHead, LabelledCall, check_head

FUSED = "_tokenrl_head"  # the attribute of a fused model


def fuse_lm_head(
    model: Any,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = ("logp", "entropy"),
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> None:
    """model(..., labels=labels) returns statistics of the labels, [B, T], no logits; without labels it is as it was.

        out.logp[b, t] = log softmax(z[b, t] / temperature)[labels[b, t + 1]], z the model's own logits
        out.loss = -sum logp / (the number of labels, or num_items_in_batch)

    Labels are shifted as transformers does: those of position t are at t + 1, the last position and labels of -100 have
    zeros and no gradient. shift_labels, in place of labels or beside them, are aligned already. The loss is the model's
    own at temperature 1 (but 0 without any label, where torch's mean is nan), with whatever the model adds to it, so
    Trainer trains as before. The other items of the output are the model's; logits is None.

    model: a PreTrainedModel whose loss is ForCausalLMLoss, or a PEFT model around one; fuse before or after PEFT, DDP,
    FSDP or Trainer wrap it. Its softcap, scale and bias are its own, a tied weight gets both gradients. outputs:
    linear_token_logprobs' names; logp always comes. compute_dtype: the GEMM's; None: autocast's, else that of the
    hidden states. memory_budget, backend: as for linear_token_logprobs.
    A second call replaces the settings of the first; unfuse_lm_head undoes both.
    Errors: ValueError naming what is refused: an argument; a model without an lm_head or with another loss; a head that
    is not a plain Linear (a PEFT adapter, a quantized weight, a partition of ZeRO-3); and in the first forward with
    labels, so before a step, whatever else a model does to its logits.
    """
    model = base_of(model)
    like = torch.zeros(1, 1, device=check_head(model).weight.device)
    asked = ("logp", *(name for name in outputs if name != "logp"))
    options: dict[str, Any] = {"temperature": temperature, "memory_budget": memory_budget, "backend": backend}
    if not like.is_meta:  # the arguments are checked here, those of a model that is not there yet when it runs
        linear_token_logprobs(like, like, like[0].long(), outputs=asked, compute_dtype=compute_dtype, **options)
    fused = getattr(model, FUSED, None)
    before = model.forward if fused is None else fused.before
    setattr(model, FUSED, FusedHead(before, asked, compute_dtype, options))
    if fused is None:
        model.forward = MethodType(fused_forward(model.__class__), model)


def unfuse_lm_head(model: Any) -> None:
    """The model's own forward again, also where something has wrapped the fused one since."""
    model = base_of(model)
    fused = getattr(model, FUSED, None)
    if fused is None:
        return
    if getattr(model.forward, "__func__", None) is not fused_forward(model.__class__):
        setattr(model, FUSED, replace(fused, options=None))
        return
    delattr(model, FUSED)
    del model.forward
    if model.forward != fused.before:  # one that the instance had
        model.forward = fused.before


def base_of(model: Any) -> Any:
    """The PreTrainedModel in a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@functools.cache
def fused_forward(kind: Any) -> Callable[..., Any]:
    """The forward of the fused models of a class, with its signature, which generate and Trainer read."""
    names = list(inspect.signature(kind.forward).parameters)[1:]

    @torch.compiler.disable(recursive=False)
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused = getattr(self, FUSED)
        given = dict(zip(names, args, strict=False)) | kwargs
        labels, shifted = given.get("labels"), given.get("shift_labels")
        if fused.options is None or (labels is None and shifted is None):
            return fused.before(*args, **kwargs)
        # A forward calls its loss where labels are given; the loss then prefers shift_labels.
        return LabelledCall(self, fused).run(given | {"labels": shifted if labels is None else labels})

    return forward
