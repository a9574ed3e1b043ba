"""What is in a recorded batch, in numbers: shapes, lengths, holes, ratios by position, and what each objective clips.

Positions are those of valid tokens, counted from 1 in each sequence, as a position-adaptive clip counts them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from ...batch.checks import check_name
from ...batch.spans import spans_of
from ...errors import wrong
from ...losses.token_metrics import TokenMetrics, token_metrics
from ...objectives.gates.kl import KlGate, KlK1, KlK2, KlK3, estimates
from ...objectives.policy import OBJECTIVES, Objective, find_objective
from ...ops.backends import BACKENDS
from ..progress import tracked
from ..rollout_batch import RolloutBatch, described_objective

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
OF_TOKENS = ("mask", "cu_seqlens", "advantages_per", "segment_ids")
LOG_PROBS = ("logp", "old_logp", "ref_logp", "rollout_logp", "entropy")
ESTIMATORS = {"k1": KlK1(), "k2": KlK2(), "k3": KlK3()}
CLIPS = ("clip_low", "clip_high", "clip_dual")


@dataclass(frozen=True)
class Inspected:
    """valid: bool [N]; position: int64 [N], 0 where a token is not valid; log_ratio: fp64 [N]. logp: as the tokens lie.
    numbers: all that is printed, as JSON has it."""

    batch: RolloutBatch
    valid: Tensor
    position: Tensor
    log_ratio: Tensor
    logp: Tensor
    numbers: dict[str, Any]


def inspected(batch: RolloutBatch, backend: str | None = None) -> Inspected:
    """All of it. backend: of the log-probs of the head, where they are not recorded, and of statistics."""
    if backend is not None:
        check_runs(backend)
    with torch.no_grad():
        logp = _log_probs(batch, backend)
        layout = batch.layout
        valid, flat = layout.valid(), logp.double().reshape(-1)
        old = batch.tensors.get("old_logp")
        before = flat if old is None else old.double().reshape(-1)
        log_ratio = torch.where(valid, flat - before, 0)
        position = _positions(valid, layout.rows())
        numbers = {
            "source": dict(batch.source), "objective": described_objective(batch.objective)[0],
            "settings": dict(batch.settings), "tensors": _tensors(batch), **_shape(batch, valid),
            "not_finite": _not_finite(batch, logp, valid), "ess": _ess(log_ratio[valid].exp()),
            "kl": _kl(batch, flat, before, valid),
            "ratio_quantiles": quantiles(log_ratio.exp(), position, powers(longest(position))),
            "own_ratio_quantiles": _own_ratio(batch, logp, position, backend),
            "objectives": _objectives(batch, logp, backend),
        }  # fmt: skip
    return Inspected(batch, valid, position, log_ratio, logp, numbers)


def check_runs(backend: str) -> None:
    """ValueError for a backend that is unknown or cannot run here: else each objective would say so."""
    check_name("backend", backend, BACKENDS)
    if reason := BACKENDS[backend].why_not(torch.device("cpu")):
        able = [name for name, one in BACKENDS.items() if one.why_not(torch.device("cpu")) is None]
        raise wrong("backend", f"{backend!r}, which cannot run here ({reason})", ", ".join(able))


def _log_probs(batch: RolloutBatch, backend: str | None) -> Tensor:
    if "logp" in batch.tensors:
        return batch.tensors["logp"]
    return next(batch.log_probs(backend) for _ in tracked([f"log-probs of the {batch.leaf}"]))


def _positions(valid: Tensor, rows: Tensor) -> Tensor:
    """int64 [N]: of valid tokens in their sequence, from 1."""
    count = valid.long().cumsum(0)
    begins = torch.ones_like(valid)
    begins[1:] = rows[1:] != rows[:-1]
    before = torch.where(begins, count - valid.long(), 0).cummax(0).values
    return torch.where(valid, count - before, 0)


def _tensors(batch: RolloutBatch) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch."), "bytes": x.nbytes}
        for name, x in batch.tensors.items()
    ]


def _shape(batch: RolloutBatch, valid: Tensor) -> dict[str, Any]:
    """Layout, counts, lengths and what the mask leaves out."""
    layout = batch.layout
    spans, cells = spans_of("sequence", layout), layout.cu_seqlens.diff()
    lengths = spans.counts().long()
    place = torch.arange(valid.numel()) - layout.spread(layout.cu_seqlens[:-1])
    first = torch.full_like(lengths, valid.numel()).scatter_reduce_(0, spans.index[valid], place[valid], "amin")
    last = torch.full_like(lengths, -1).scatter_reduce_(0, spans.index[valid], place[valid], "amax")
    some = lengths > 0
    holes = torch.where(some, last - first + 1 - lengths, 0)
    return {
        "layout": "packed" if layout.width is None else "padded", "sequences": layout.num_sequences,
        "cells": layout.num_tokens, "tokens": int(valid.sum()),
        "lengths": _summary(lengths), "empty_sequences": int((~some).sum()),
        "holes": {
            "tokens": int(holes.sum()), "sequences": int((holes > 0).sum()),
            "before": int(torch.where(some, first, 0).sum()),
            "after": int(torch.where(some, cells - last - 1, cells).sum()),
        },
    }  # fmt: skip


def _summary(x: Tensor) -> dict[str, float | None]:
    if not x.numel():
        return dict.fromkeys(("min", "median", "mean", "max"))
    values = x.double()
    return {
        "min": float(values.min()), "median": float(numpy.median(values.numpy())), "mean": float(values.mean()),
        "max": float(values.max()),
    }  # fmt: skip


def _not_finite(batch: RolloutBatch, logp: Tensor, valid: Tensor) -> dict[str, int]:
    """Tensor -> how many of its valid tokens are NaN or infinite."""
    given = {"logp": logp} | {name: batch.tensors[name] for name in LOG_PROBS if name in batch.tensors}
    odd = {name: int((~x.reshape(-1).isfinite() & valid).sum()) for name, x in given.items()}
    return {name: count for name, count in odd.items() if count}


def _ess(ratio: Tensor) -> float:
    """(sum r)^2 / (n sum r^2), in the largest ratio's scale; nan without tokens."""
    if not ratio.numel():
        return math.nan
    r = ratio.double() / ratio.max()
    return float(r.sum() ** 2 / (r.numel() * (r * r).sum()))


def _kl(batch: RolloutBatch, logp: Tensor, old: Tensor, valid: Tensor) -> dict[str, dict[str, float]]:
    """Means of the estimates; of KL(p || q) the tokens are taken for samples of p."""
    flat = {
        name: batch.tensors[name].double().reshape(-1) for name in ("ref_logp", "rollout_logp") if name in batch.tensors
    }
    pairs = {"old || new": (old, logp)} if "old_logp" in batch.tensors else {}
    if "ref_logp" in flat:
        pairs["new || reference"] = (logp, flat["ref_logp"])
    if "rollout_logp" in flat:
        pairs["rollout || old"] = (flat["rollout_logp"], old)
    count = max(int(valid.sum()), 1)
    return {
        pair: {
            name: float(estimates(gate, p, q, valid, math.inf, math.inf).sum() / count)
            for name, gate in ESTIMATORS.items()
        }
        for pair, (p, q) in pairs.items()
    }


def longest(position: Tensor) -> int:
    return int(position.max()) if position.numel() else 0


def powers(longest: int) -> list[tuple[int, int]]:
    """(first, last) position of bins that double: 1, 2 to 3, 4 to 7 and so on."""
    return [(1 << k, min((2 << k) - 1, longest)) for k in range(longest.bit_length())]


def even_bins(longest: int, most: int) -> list[tuple[int, int]]:
    """The same of bins of one width, so many at most."""
    width = -(-longest // most) if longest else 1
    return [(begin, min(begin + width - 1, longest)) for begin in range(1, longest + 1, width)]


def quantiles(x: Tensor, position: Tensor, bins: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Of the tokens of each bin of positions; a bin without any is left out."""
    order = position.argsort(stable=True)
    values, at = x[order].numpy(), position[order].contiguous()
    ends = [int(torch.searchsorted(at, edge)) for first, last in bins for edge in (first, last + 1)]
    found = []
    for (first, last), begin, end in zip(bins, ends[::2], ends[1::2], strict=True):
        if end > begin:
            levels = numpy.quantile(values[begin:end], QUANTILES).tolist()
            found.append({"from": first, "to": last, "tokens": end - begin, "quantiles": levels})
    return found


def clipped_tokens(row: str | Objective, batch: RolloutBatch, logp: Tensor, backend: str | None) -> TokenMetrics:
    """token_metrics of a row on a batch."""
    given: dict[str, Any] = {"old_logp": None, "advantages": None} | batch.arguments(
        ("old_logp", "advantages", *OF_TOKENS)
    )
    return token_metrics(row, logp, given.pop("old_logp"), given.pop("advantages"), **given, backend=backend)


def by_batch(row: Objective, batch: RolloutBatch) -> bool:
    """Whether token_metrics does not know a row: a form, whose tokens meet, or the rollout's weights in its ratio."""
    return row.form is not None or (row.gate.reads_rollout and "rollout_logp" in batch.tensors)


def _own_ratio(batch: RolloutBatch, logp: Tensor, position: Tensor, backend: str | None) -> list[dict[str, Any]]:
    """Quantiles of the ratio that the recorded objective clips, where that is not the token's: as of a prefix."""
    if batch.objective.statistic == "token" or by_batch(batch.objective, batch):
        return []
    ratio = clipped_tokens(batch.objective, batch, logp, backend).ratio.reshape(-1).double()
    return quantiles(ratio, position, powers(longest(position)))


def _objectives(batch: RolloutBatch, logp: Tensor, backend: str | None) -> list[dict[str, Any]]:
    """Of the batch's own objective and of each row of the table that is no estimate of a KL: the shares of valid tokens
    on which any bound and each is active, mean and effective sample size of its own ratio; or why it cannot run here.
    """
    rows: list[tuple[str, str | Objective]] = [(f"{batch.objective.name}, recorded", batch.objective)]
    rows += [(name, name) for name, row in OBJECTIVES.items() if not isinstance(row.gate, KlGate)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the form that draws tokens
        return [{"name": name} | _clips(row, batch, logp, backend) for name, row in tracked(rows, lambda pair: pair[0])]


def _clips(row: str | Objective, batch: RolloutBatch, logp: Tensor, backend: str | None) -> dict[str, Any]:
    try:
        if by_batch(find_objective(row), batch):
            alone = {name: x for name, x in batch.settings.items() if name != "entropy_coef"}
            metrics = replace(batch, settings=alone).loss(row, logp=logp, backend=backend)[1]
            return {"clipped": None} | {name: getattr(metrics, name) for name in (*CLIPS, "ratio_mean", "ess")}
        found = clipped_tokens(row, batch, logp, backend)
    except ValueError as error:
        return {"reason": str(error).splitlines()[0]}
    valid = found.layout.valid()
    flat = {name: getattr(found, name).reshape(-1)[valid].double() for name in (*CLIPS, "ratio")}
    shares = {name: float(flat[name].mean()) for name in CLIPS}
    clipped = torch.stack([flat[name] for name in CLIPS]).amax(0)
    return {
        "clipped": float(clipped.mean()), **shares, "ratio_mean": float(flat["ratio"].mean()),
        "ess": _ess(flat["ratio"]),
    }  # fmt: skip
