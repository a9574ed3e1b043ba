"""A recorded rollout batch: what a loss was called with, as tensors and words by the names of its arguments.

A file is safetensors, so reading one runs no code (SECURITY.md). Its metadata are strings: format
"tokenrl.rollout_batch", version, and three JSON objects: objective {"name", "parameters"}, settings (arguments that are
no tensors) and source (where the batch came from, free words). Its tensors, tokens [B, T] padded or [N] packed, S
sequences:

    ids                 int64, of the tokens; logits [.., V], or hidden [.., D], weight [V, D] and bias [V]: the head
    logp                fp32 or fp64, of the tokens: with no head, or beside it
    old_logp, ref_logp, rollout_logp, entropy, token_weight, kl_weight, entropy_weight    floats of the tokens
    advantages          [S] or of the tokens; rewards [S]; group_ids int64 [S]; segment_ids int64 of the tokens
    mask                bool of the tokens; cu_seqlens int64 [S + 1], packed alone
    temperature         of the tokens, where it is no number; keep_mask bool [V] or like logits
    objective.<name>    parameters of the objective that are tensors, of the tokens

An entropy that is no tensor here, of a loss with an entropy_coef, is the head's.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch.layout import Layout, layout_of
from ..errors import unknown, wrong
from ..logprobs.from_hidden import linear_token_logprobs
from ..logprobs.from_logits import token_logprobs
from ..losses.policy import policy_loss
from ..objectives.gates.base import map_params
from ..objectives.metrics import Metrics
from ..objectives.policy import OBJECTIVES, Objective, find_objective, objective

FORMAT, VERSION = "tokenrl.rollout_batch", 1
FLOATS, INTEGERS = (torch.float32, torch.float64), (torch.int64,)
HEAD_FLOATS = (torch.float16, torch.bfloat16, *FLOATS)
PER_TOKEN = {
    "ids": INTEGERS, "logp": FLOATS, "old_logp": FLOATS, "ref_logp": FLOATS, "rollout_logp": FLOATS, "entropy": FLOATS,
    "token_weight": FLOATS, "kl_weight": FLOATS, "entropy_weight": FLOATS, "segment_ids": INTEGERS,
    "mask": (torch.bool,), "temperature": FLOATS,
}  # fmt: skip
PER_SEQUENCE = {"rewards": FLOATS, "group_ids": INTEGERS}
HEAD = {"logits": HEAD_FLOATS, "hidden": HEAD_FLOATS}  # of the tokens and a last dimension
FIXED = {"weight": HEAD_FLOATS, "bias": HEAD_FLOATS}
OTHERS = {"advantages": FLOATS, "cu_seqlens": INTEGERS, "keep_mask": (torch.bool,)}
DTYPES = PER_TOKEN | PER_SEQUENCE | HEAD | FIXED | OTHERS
OF_OBJECTIVE = "objective."
TRANSFORM = ("temperature", "softcap", "logit_scale", "keep_mask")
OF_LOSS = (
    "old_logp", "advantages", "mask", "cu_seqlens", "advantages_per", "segment_ids", "group_ids", "entropy",
    "rollout_logp", "correction", "token_weight", "aggregation", "normalizer", "ref_logp", "kl", "kl_coef", "kl_weight",
    "kl_ratio", "entropy_coef", "entropy_weight",
)  # fmt: skip
SETTINGS = (
    "temperature", "softcap", "logit_scale", "advantages_per", "correction", "aggregation", "normalizer", "kl",
    "kl_coef", "kl_ratio", "entropy_coef",
)  # fmt: skip


@dataclass(frozen=True)
class RolloutBatch:
    """tensors, settings: by argument, as at the head of this file; checked. source: words on where it comes from."""

    tensors: Mapping[str, Tensor]
    objective: Objective
    settings: Mapping[str, Any]
    source: Mapping[str, str]

    def __post_init__(self) -> None:
        check(self)

    @property
    def tokens(self) -> Tensor:
        """The tensor whose shape is that of the tokens."""
        return self.tensors["ids" if "ids" in self.tensors else "logp"]

    @property
    def layout(self) -> Layout:
        name = "ids" if "ids" in self.tensors else "logp"
        mask, boundaries = (self.tensors.get(key) for key in ("mask", "cu_seqlens"))
        return layout_of(self.tokens, mask=mask, cu_seqlens=boundaries, name=name)

    @property
    def leaf(self) -> str:
        """What gradients are taken by: "logits", "hidden" or, without a head, "logp"."""
        return next(name for name in ("logits", "hidden", "logp") if name in self.tensors)

    def arguments(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of these arguments that the batch has."""
        both = {**self.settings, **self.tensors}
        return {name: both[name] for name in names if both.get(name) is not None}

    def to(self, device: torch.device | str) -> "RolloutBatch":
        return self.mapped(lambda _, x: x.to(device))

    def under(self, objective: str | Objective | None) -> "RolloutBatch":
        """With another objective; None: its own."""
        return self if objective is None else replace(self, objective=find_objective(objective))

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> "RolloutBatch":
        """change(name, tensor) of each tensor, those of the objective too."""
        row = mapped_objective(self.objective, lambda name, x: change(f"{OF_OBJECTIVE}{name}", x))
        return replace(self, tensors={name: change(name, x) for name, x in self.tensors.items()}, objective=row)

    def cast(self, dtype: torch.dtype) -> "RolloutBatch":
        """All floats in another precision."""
        return replace(
            self, tensors={name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()}
        )

    @property
    def entropy_of_head(self) -> bool:
        """Whether the loss has a bonus of entropies that are no tensor of the batch."""
        return self.leaf != "logp" and self.settings.get("entropy_coef", 0.0) != 0 and "entropy" not in self.tensors

    def scored(self, backend: str | None = None, row_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(log-probs, entropies) of the tokens, by the head where there is one, differentiable in the batch's tensors;
        no entropies but those that the loss takes from the head. row_mask: the tokens that the head is asked for."""
        if self.leaf == "logp":
            return self.tensors["logp"], None
        outputs = ("logp", "entropy") if self.entropy_of_head else ("logp",)
        how: dict[str, Any] = self.arguments(TRANSFORM) | {"outputs": outputs, "row_mask": row_mask, "backend": backend}
        if self.leaf == "logits":
            stats = token_logprobs(self.tensors["logits"], self.tensors["ids"], **how)
        else:
            head = (self.tensors[name] for name in ("hidden", "weight", "ids"))
            stats = linear_token_logprobs(*head, bias=self.tensors.get("bias"), **how)
        return stats.logp, stats.entropy if self.entropy_of_head else None

    def log_probs(self, backend: str | None = None) -> Tensor:
        return self.scored(backend)[0]

    def loss(
        self, objective: str | Objective | None = None, *, logp: Tensor | None = None, entropy: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        """policy_loss of the batch, of its own objective or another. logp, entropy: in place of the head's, both."""
        row = self.objective if objective is None else find_objective(objective)
        given: dict[str, Any] = {"old_logp": None, "advantages": None} | self.arguments(OF_LOSS)
        if logp is None:
            logp, entropy = self.scored(backend)
        if entropy is not None:
            given["entropy"] = entropy
        return policy_loss(row, logp, **given, backend=backend)


def check(batch: RolloutBatch) -> None:
    """ValueError where a tensor is missing, unknown, or of another dtype or shape than its name says."""
    tensors = batch.tensors
    for name, x in tensors.items():
        if name.startswith(OF_OBJECTIVE):
            continue
        if name not in DTYPES:
            raise unknown("tensor", name, DTYPES)
        if x.dtype not in DTYPES[name]:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[name])
            raise wrong(name, f"dtype {x.dtype}", accepted)
    for name in batch.settings:
        if name not in SETTINGS:
            raise unknown("setting", name, SETTINGS)
    _check_head(tensors)
    layout = batch.layout
    for name in PER_TOKEN.keys() & tensors.keys():
        layout.check_tokens(name, tensors[name])
    for name in PER_SEQUENCE.keys() & tensors.keys():
        layout.flat_sequences(name, tensors[name], tensors[name].dtype)
    if "advantages" in tensors:
        advantages = tensors["advantages"]
        layout.flat_tokens_or_sequences(
            "advantages", advantages, advantages.dtype, batch.settings.get("advantages_per")
        )
    mapped_objective(batch.objective, functools.partial(_checked_parameter, layout))


def _checked_parameter(layout: Layout, name: str, x: Tensor) -> Tensor:
    layout.check_tokens(f"{OF_OBJECTIVE}{name}", x)
    return x


def _check_head(tensors: Mapping[str, Tensor]) -> None:
    if not tensors.keys() & {"logits", "hidden", "logp"}:
        raise wrong("batch", f"{', '.join(tensors) or 'no tensors'}", "logits, hidden with weight, or logp")
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    for name in HEAD.keys() & tensors.keys():
        if "ids" not in tensors:
            raise wrong("ids", None, f"one id per row of {name}")
        if shapes[name][:-1] != shapes["ids"] or tensors[name].dim() == 0:
            raise wrong(name, f"shape {shapes[name]}", f"a row for each of the ids, {shapes['ids']}")
    if "hidden" in tensors and "weight" not in tensors:
        raise wrong("weight", None, "the head's, [V, D], beside hidden")
    if "weight" in tensors and "hidden" in tensors and shapes["weight"][1:] != shapes["hidden"][-1:]:
        raise wrong("weight", f"shape {shapes['weight']}", f"[V, {shapes['hidden'][-1]}], as hidden is wide")
    if "bias" in tensors and shapes["bias"] != shapes.get("weight", [0])[:1]:
        raise wrong("bias", f"shape {shapes['bias']}", f"{shapes.get('weight', [0])[:1]}, one per row of weight")


def mapped_objective(row: Objective, change: Callable[[str, Tensor], Tensor]) -> Objective:
    """change(name, tensor) of each parameter that is a tensor."""
    parts: Mapping[str, Any] = {name: map_params(part, change) for name, part in row.parts.items()}
    return replace(row, **parts)


def described_objective(row: Objective) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(name and changed parameters of a row as JSON, those that are tensors)."""
    if row.name not in OBJECTIVES:
        raise wrong("objective", repr(row.name), "a row of the table (tokenrl.register adds one)")
    table = OBJECTIVES[row.name]
    fields = ("statistic", "flow", "aggregation", "clamp", "cap")
    changed = {name: getattr(row, name) for name in fields if getattr(row, name) != getattr(table, name)}
    for name, part in row.parts.items():
        if type(part) is not type(table.parts.get(name)):
            raise wrong("objective", f"{row.name!r} with a {name} of its own", "a row of the table, or its parameters")
        for key in part.names:
            value = getattr(part, key)
            if isinstance(value, Tensor) or value != getattr(table.parts[name], key):
                changed[key] = value
    tensors = {f"{OF_OBJECTIVE}{key}": value for key, value in changed.items() if isinstance(value, Tensor)}
    words = {key: value for key, value in changed.items() if not isinstance(value, Tensor)}
    return {"name": row.name, "parameters": words}, tensors


def _objective_of(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Objective:
    own = {name.removeprefix(OF_OBJECTIVE): x for name, x in tensors.items() if name.startswith(OF_OBJECTIVE)}
    return objective(described["name"], **described.get("parameters", {}), **own)


def owned(x: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return torch.empty_like(x, device="cpu", memory_format=torch.contiguous_format).copy_(x)


def save(batch: RolloutBatch, path: str | Path) -> None:
    """Writes the file, of a batch on the CPU."""
    from safetensors.torch import save_file

    row, of_objective = described_objective(batch.objective)
    metadata = {"format": FORMAT, "version": str(VERSION), "objective": json.dumps(row)}
    metadata |= {"settings": json.dumps(dict(batch.settings)), "source": json.dumps(dict(batch.source))}
    save_file({**batch.tensors, **of_objective}, str(path), metadata)


def load_batch(path: str | Path) -> RolloutBatch:
    """A file that tokenrl.record has written, checked; reading it runs no code.

    Args:
        path: of the file.

    Returns:
        A tokenrl.RolloutBatch, on the CPU.

    Raises:
        ValueError: what is wrong with the file.
        OSError: where there is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise wrong("path", f"{path}, damaged ({error})", "a file that tokenrl.record wrote") from None
    if metadata.get("format") != FORMAT:
        raise wrong("path", f"{path}, of format {metadata.get('format')!r}", f"{FORMAT!r}, as tokenrl.record writes it")
    if metadata.get("version") != str(VERSION):
        newer = f"{VERSION} (a newer tokenrl reads newer)"
        raise wrong("path", f"{path}, of version {metadata.get('version')!r}", newer)
    try:
        row, settings, source = (_words(metadata[name]) for name in ("objective", "settings", "source"))
        chosen = _objective_of(row, tensors)
    except (KeyError, TypeError) as error:
        raise wrong("path", f"{path}, unread metadata ({error!r})", "what tokenrl.record wrote") from None
    kept = {name: x for name, x in tensors.items() if not name.startswith(OF_OBJECTIVE)}
    return RolloutBatch(kept, chosen, settings, source)


def _words(text: str) -> dict[str, Any]:
    """A JSON object; TypeError where it is none, is nested too deeply, or has an integer of thousands of digits."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TypeError(str(error)) from None
    if not isinstance(found, dict):
        raise TypeError(f"{type(found).__name__} for an object")
    return found
