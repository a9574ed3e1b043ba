"""Some columns of the logits of some tokens, from logits in memory or from hidden states and a head."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.checks import check_bytes, check_tensor
from ..batch.layout import layout_of
from ..batch.valid_tokens import ValidTokens, valid_tokens
from ..errors import wrong
from ..ops.linear.gemm import linear, sum_dtype
from ..ops.linear.head import Head
from .from_hidden import DEFAULT_BUDGET, linear_token_logprobs
from .from_logits import DTYPES, token_logprobs


@dataclass(frozen=True)
class LogitColumns:
    """Logits [rows, V] in memory; rows: int64 [N], where the cells of the layout are among them."""

    logits: Tensor
    index: Tensor

    @property
    def vocab(self) -> int:
        return self.logits.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.logits.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def bytes_per_token(self) -> int:
        return self.vocab * self.logits.element_size()

    @property
    def bytes_per_column(self) -> int:
        return 0

    def states(self, cells: Tensor) -> Tensor:
        return self.logits.index_select(0, self.index[cells])

    def columns(self, states: Tensor, at: slice | Tensor) -> Tensor:
        return states[:, at].to(self.dtype)


@dataclass(frozen=True)
class HeadColumns:
    """Logits that a head computes where they are asked for; hidden [N, D]."""

    hidden: Tensor
    head: Head

    @property
    def vocab(self) -> int:
        return self.head.vocab

    @property
    def dtype(self) -> torch.dtype:
        return sum_dtype(self.head.dtype)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def bytes_per_token(self) -> int:
        return self.hidden.shape[1] * self.head.dtype.itemsize

    @property
    def bytes_per_column(self) -> int:
        return self.hidden.shape[1] * self.head.dtype.itemsize * (self.head.weight.dtype != self.head.dtype)

    def states(self, cells: Tensor) -> Tensor:
        return self.hidden.index_select(0, cells).to(self.head.dtype)

    def columns(self, states: Tensor, at: slice | Tensor) -> Tensor:
        z = linear(states, self.head.columns(at))
        if self.head.bias is not None:
            z += self.head.bias[at].to(self.head.dtype)
        return z.to(self.dtype).div_(self.head.temperature)


def logit_columns(logits: Tensor, valid: ValidTokens, ids: Tensor | None = None) -> tuple[LogitColumns, Tensor]:
    """(the source, lse of the valid tokens [M]); no copy of logits whose tokens lie at one distance, as logits[:, :-1]
    do. ids are checked against the vocabulary, and else not used."""
    ids = valid.cells.new_zeros(logits.shape[:-1]) if ids is None else ids
    mask = valid.layout.valid().view(ids.shape)
    lse = token_logprobs(logits, ids, row_mask=mask, outputs=("lse",)).lse.reshape(-1)[valid.cells]
    index = torch.arange(ids.numel(), device=ids.device)
    rows, width = ids.shape if ids.dim() == 2 else (1, ids.numel())
    between, step, unit = (0, *logits.stride())[-3:]
    apart, uneven = divmod(between, max(step, 1))
    if unit != 1 or step == 0 or uneven or not ids.numel():
        return LogitColumns(logits.reshape(-1, logits.shape[-1]), index), lse
    shape = ((rows - 1) * apart + width, logits.shape[-1])
    return LogitColumns(logits.as_strided(shape, (step, 1)), index // width * apart + index % width), lse


def head_columns(
    hidden: Tensor, weight: Tensor, valid: ValidTokens, bias: Tensor | None, compute_dtype: torch.dtype | None,
    memory_budget: int | None, temperature: float = 1.0, ids: Tensor | None = None,
) -> tuple[HeadColumns, Tensor]:  # fmt: skip
    """As logit_columns."""
    ids = valid.cells.new_zeros(hidden.shape[:-1]) if ids is None else ids
    lse = linear_token_logprobs(
        hidden, weight, ids, row_mask=valid.layout.valid().view(ids.shape), bias=bias, temperature=temperature,
        outputs=("lse",), compute_dtype=compute_dtype, memory_budget=memory_budget,
    ).lse.reshape(-1)[valid.cells]  # fmt: skip
    flat, dtype = hidden.reshape(-1, hidden.shape[-1]), compute_dtype or hidden.dtype
    return HeadColumns(flat, Head(None, weight, bias, temperature, None, math.inf, 1.0, None, dtype)), lse


def tokens_of(x: Tensor, name: str, mask: Tensor | None, cu_seqlens: Tensor | None) -> ValidTokens:
    check_tensor(name, x)
    last = "V" if name == "logits" else "D"
    if x.dim() != (3 if cu_seqlens is None else 2) or x.shape[-1] == 0:
        accepted = f"[B, T, {last}], or [N, {last}] with cu_seqlens, {last} >= 1"
        raise wrong(name, f"shape {list(x.shape)}", accepted)
    if x.dtype not in DTYPES:
        raise wrong(name, f"dtype {x.dtype}", ", ".join(map(str, DTYPES)))
    return valid_tokens(layout_of(x[..., 0], mask=mask, cu_seqlens=cu_seqlens, name=name))


def budget_of(memory_budget: int | None, like: Tensor) -> int:
    if memory_budget is None:
        return DEFAULT_BUDGET.get(like.device.type, DEFAULT_BUDGET["cpu"])
    check_bytes("memory_budget", memory_budget)
    return memory_budget
