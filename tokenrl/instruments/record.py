"""tokenrl.record: the first batch that a training step gives to a loss, as a file (rollout_batch.py)."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..batch.checks import check_number
from ..errors import wrong
from ..objectives.policy import Objective, find_objective
from ..observed import observing
from ..ops.kernel_ops import IGNORED
from . import rollout_batch
from .rollout_batch import DTYPES, FIXED, PER_SEQUENCE, PER_TOKEN, SETTINGS, RolloutBatch, owned

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
HEADS = ("token_logprobs", "linear_token_logprobs")
SCORES = ("logp", "entropy")
LOSSES = ("policy_loss", "linear_policy_loss")


def bytes_of(limit: int | float | str, name: str = "limit") -> int:
    """A number of bytes, or words as "512 MB"."""
    if not isinstance(limit, str):
        check_number(name, limit, above=0, accepted="a positive number of bytes, or as '512 MB'")
        return int(limit)
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]+)\s*", limit)
    if not found or found[2].upper() not in UNITS:
        raise wrong(name, repr(limit), "a number of bytes, or as '512 MB', '2 GiB'")
    return int(float(found[1]) * UNITS[found[2].upper()])


@dataclass
class Recording:
    """What record has written: the batch, and the sequences that were left out of it for the limit. batch is None until
    a loss was called. other_losses: the names of those called before it that have no place in the schema."""

    path: Path
    limit: int
    source: Mapping[str, str]
    batch: RolloutBatch | None = None
    left_out: int = 0
    other_losses: set[str] = field(default_factory=set)
    _heads: list["Head"] = field(default_factory=list)

    def observe(self, function: str, arguments: Mapping[str, Any], result: Any) -> None:
        if self.batch is not None:
            return
        if function in HEADS:
            self._heads = [head for head in self._heads if not head.made["logp"][0].expired()]
            if "logp" in arguments["outputs"] and arguments["ids"].dim() == _rows(arguments):
                self._heads.append(Head.of(arguments, result))
        elif function in LOSSES:
            self._write(function, arguments)
        elif function.endswith("_loss"):
            self.other_losses.add(function)

    def _write(self, function: str, arguments: Mapping[str, Any]) -> None:
        given = dict(arguments)
        if function == "policy_loss":
            given = self._with_head(given)
        batch = batch_of(given, {"function": function, **_here(), **self.source})
        batch, self.left_out = cut(batch, self.limit)
        self.batch = batch.mapped(lambda _, x: owned(x))
        self._heads = []
        rollout_batch.save(self.batch, self.path)

    def _with_head(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Beside the arguments of the call that made these log-probs, rows as they were taken from its, if one did. An
        entropy that it made too, with a gradient, is the head's and no tensor of the batch."""
        for head in self._heads:
            rows = head.rows("logp", given["logp"])
            if rows is None:
                continue
            entropy = given["entropy"]
            if entropy is not None and entropy.requires_grad and given["entropy_coef"] != 0:
                of_entropy = head.rows("entropy", entropy)
                if of_entropy is not None and torch.equal(of_entropy, rows):
                    given = {**given, "entropy": None}
            shape = head.arguments["ids"].shape
            return {name: _at(rows, shape, x) for name, x in head.arguments.items()} | {**given}
        return {**given}


@dataclass(frozen=True)
class Head:
    """A call of a head. made: the memory of what it gave, weakly, and where that begins there."""

    arguments: Mapping[str, Any]
    made: Mapping[str, tuple[StorageWeakRef, int]]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], result: Any) -> "Head":
        given = {name: getattr(result, name) for name in SCORES if name in arguments["outputs"]}
        made = {name: (StorageWeakRef(x.untyped_storage()), x.storage_offset()) for name, x in given.items()}
        return cls(dict(arguments), made)

    def rows(self, name: str, x: Tensor) -> Tensor | None:
        """Which of its rows, int64 of the shape of x; None where it did not make x."""
        memory, begin = self.made.get(name, (None, 0))
        if memory is None or memory.expired() or memory.cdata != x.untyped_storage()._cdata:
            return None
        rows = torch.arange(self.arguments["ids"].numel(), device=x.device)
        return rows.as_strided(x.shape, x.stride(), x.storage_offset() - begin)


def _rows(head: Mapping[str, Any]) -> int:
    """The dimensions of the rows of a head's input: with several ids a row there is no batch of it."""
    return head["logits" if "logits" in head else "hidden"].dim() - 1


def _at(rows: Tensor, shape: torch.Size, x: Any) -> Any:
    """Of a tensor with something for each of `shape` that of `rows`; anything else as it is."""
    if not isinstance(x, Tensor) or x.shape[: len(shape)] != shape:
        return x
    return x.detach().reshape(-1, *x.shape[len(shape) :])[rows]


def _here() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": torch.__version__, "tokenrl": version("tokenrl"), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def batch_of(arguments: Mapping[str, Any], source: Mapping[str, str]) -> RolloutBatch:
    """The batch of a call of a loss and of the head before it. Tensors lie where they lay."""
    tensors, settings = {}, {}
    shape = arguments["ids" if "ids" in arguments else "logp"].shape
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.dim() > 0 and name in DTYPES:
            tensors[name] = _as_stored(name, x.detach(), shape)
        elif name in SETTINGS and x is not None:
            settings[name] = _as_words(name, x)
    if arguments.get("on_policy"):
        tensors.pop("old_logp", None)
    if (ignored := arguments.get("ignore_index", IGNORED)) != IGNORED:
        tensors["ids"] = tensors["ids"].masked_fill(tensors["ids"] == ignored, IGNORED)
    if "logp" not in arguments:  # from hidden states an ignored id takes its token out of the loss
        named = tensors["ids"] != IGNORED
        if not named.all():
            tensors["mask"] = named & tensors.get("mask", named)
    return RolloutBatch(tensors, find_objective(arguments["objective"]), settings, source)


def _as_stored(name: str, x: Tensor, shape: torch.Size) -> Tensor:
    """In a dtype of the schema, and whole where it was one number per sequence for each of its tokens."""
    x = x if x.dtype in DTYPES[name] else x.to(DTYPES[name][0])
    column = name in PER_TOKEN and len(shape) == 2 and x.shape == (shape[0], 1)
    return x.expand(shape) if column else x


def _as_words(name: str, x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.item()
    if isinstance(x, Objective):
        return x.name
    try:
        json.dumps(x)
    except TypeError:
        raise wrong(name, repr(x), "numbers and words, to be recorded") from None
    return x


def cut(batch: RolloutBatch, limit: int) -> tuple[RolloutBatch, int]:
    """(its first sequences, as many as take at most `limit` bytes; how many were left out)."""
    sequences = batch.layout.num_sequences
    whole: dict[str, int] = {}
    batch.mapped(lambda name, x: (whole.update({name: x.nbytes}), x)[1])
    fixed, size = sum(whole[name] for name in FIXED if name in whole), sum(whole.values())
    if size <= limit:
        return batch, 0
    ends = batch.layout.cu_seqlens.tolist()
    share = (size - fixed) / max(batch.tokens.numel(), 1)
    fitting = sum(1 for end in ends[1:] if fixed + end * share <= limit)
    if fitting == 0:
        needed = fixed + (ends[1] - ends[0]) * share
        raise wrong("limit", f"{limit:,} bytes", f"at least {needed:,.0f}: the head and one sequence")
    return first(batch, fitting), sequences - fitting


def first(batch: RolloutBatch, count: int) -> RolloutBatch:
    """The first sequences of a batch."""
    packed, end = batch.layout.width is None, int(batch.layout.cu_seqlens[count])
    rows = end if packed else count

    def part(name: str, x: Tensor) -> Tensor:
        if name in FIXED or (name == "keep_mask" and x.dim() == 1):
            return x
        if name == "cu_seqlens":
            return x[: count + 1]
        per_sequence = name in PER_SEQUENCE or (name == "advantages" and x.shape != batch.tokens.shape)
        return x[:count] if per_sequence else x[:rows]

    return batch.mapped(part)


@contextmanager
def record(
    path: str | Path, *, limit: int | str = "1 GB", source: Mapping[str, str] | None = None
) -> Iterator[Recording]:
    """Saves the batch of the first loss that is called inside.

        with tokenrl.record("batch.safetensors", limit="2 GB") as recording:
            training_step()
        print(recording.left_out, "sequences left out")

    Seen are policy_loss and linear_policy_loss; with policy_loss the logits, or hidden states and weight, come along
    where its logp is what token_logprobs or linear_token_logprobs gave inside, or a view of it, and log-probs alone
    otherwise. The numbers are those at the time of the call. Batches of other losses, pairs of preference_loss or a
    teacher's distributions, have no place in the schema.

    Args:
        path: of a safetensors file (its schema: tokenrl/instruments/rollout_batch.py), written at that call.
        limit: bytes, or as "512 MB": whole sequences from the first on, as many as fit beside the head.
        source: words on where the batch comes from.

    Raises:
        ValueError: where the limit holds no sequence.
        RuntimeError: at the end where neither loss was called; it names the others that were.
    """
    recording = Recording(Path(path), bytes_of(limit), dict(source or {}))
    with observing(recording.observe):
        yield recording
    if recording.batch is None:
        seen = f"{', '.join(sorted(recording.other_losses))} alone" if recording.other_losses else "no loss"
        raise RuntimeError(f"record: saw {seen}, accepted: a call of {' or '.join(LOSSES)} inside.")
