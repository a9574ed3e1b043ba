"""Padded and packed batches, seen as one thing: flat tokens and the boundaries of their sequences."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import wrong
from .checks import as_saved, check_name, check_tensor, values_known

PER = ("sequence", "token")


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a batch lie in its flat tokens.

    shape: of a token tensor as the caller gave it, [B, T] or [N]. cu_seqlens: int64 [S + 1]. mask: bool [N] or None
    (every token takes part). width: T of a padded batch, None for a packed one.
    """

    shape: torch.Size
    cu_seqlens: Tensor
    mask: Tensor | None
    width: int | None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.shape.numel()

    def valid(self) -> Tensor:
        """bool [N]: the tokens that take part."""
        if self.mask is None:
            return torch.ones(self.num_tokens, dtype=torch.bool, device=self.cu_seqlens.device)
        return self.mask

    def rows(self) -> Tensor:
        """int64 [N]: the sequence of each token."""
        return self.spread(torch.arange(self.num_sequences, device=self.cu_seqlens.device))

    def spread(self, x: Tensor) -> Tensor:
        """[S] -> [N]: to each token what its sequence has."""
        if self.width is not None:
            return x[:, None].expand(-1, self.width).reshape(-1)
        return x.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)

    def per_token(self, x: Tensor | None, like: Tensor) -> Tensor:
        """[S], [N] or None for zeros -> [N] in the dtype of `like`, zero in masked cells."""
        if x is None:
            return torch.zeros_like(like, requires_grad=False)
        if x.numel() != self.num_tokens:
            x = self.spread(x)
        return torch.where(self.valid(), x, 0).to(like.dtype)

    def check_tokens(self, name: str, x: Tensor) -> None:
        check_tensor(name, x)
        if x.shape != self.shape:
            raise wrong(name, f"shape {list(x.shape)}", f"one value per token, {list(self.shape)}")
        self._check_device(name, x)

    def flat_tokens(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A per-token argument, checked, as a contiguous [N]."""
        self.check_tokens(name, x)
        return _contiguous(x.reshape(-1), dtype or x.dtype)

    def flat_sequences(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A per-sequence argument, checked, as a contiguous [S]."""
        check_tensor(name, x)
        if x.shape != (self.num_sequences,):
            raise wrong(name, f"shape {list(x.shape)}", f"one value per sequence, [{self.num_sequences}]")
        self._check_device(name, x)
        return _contiguous(x, dtype)

    def flat_tokens_or_sequences(self, name: str, x: Tensor, dtype: torch.dtype, per: str | None = None) -> Tensor:
        """[N] or [S], flat, told apart by their length: where both are one, [N]. per: which of the two x is, where a
        packed batch has as many sequences as tokens; None: one per token. [B, 1] is [B]."""
        check_tensor(name, x)
        if self.width is not None and per != "token" and x.shape == (self.num_sequences, 1) != self.shape:
            x = x[:, 0]
        if per is not None:
            check_name(f"{name}_per", per, PER)
        if per != "sequence" and x.shape == self.shape:
            return self.flat_tokens(name, x, dtype)
        if per != "token" and x.shape == (self.num_sequences,):
            flat = self.flat_sequences(name, x, dtype)
            return flat if self.num_sequences != self.num_tokens else self.spread(flat).contiguous()
        kinds = {"sequence": f"per sequence, [{self.num_sequences}]", "token": f"per token, {list(self.shape)}"}
        accepted = ", or ".join(kinds.values()) if per is None else kinds[per]
        raise wrong(name, f"shape {list(x.shape)}", f"one {accepted}")

    def of_tokens(self, name: str, x: Tensor, dtype: torch.dtype, per: str | None = None) -> Tensor:
        """The same, always [N]."""
        flat = self.flat_tokens_or_sequences(name, x, dtype, per)
        return flat if flat.numel() == self.num_tokens else self.spread(flat)

    def _check_device(self, name: str, x: Tensor) -> None:
        if x.device != self.cu_seqlens.device:
            raise wrong(name, f"device {x.device}", f"the device of the other tensors, {self.cu_seqlens.device}")


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Without a call into torch where there is nothing to do."""
    x = as_saved(x) if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def layout_of(x: Tensor, *, mask: Tensor | None, cu_seqlens: Tensor | None, name: str = "logp") -> Layout:
    """The layout of a batch whose token tensor `x` (`name` in errors) is [B, T], or [N] with cu_seqlens [S + 1]."""
    check_tensor(name, x)
    if cu_seqlens is None:
        if x.dim() != 2:
            raise wrong(
                name, f"shape {list(x.shape)} without cu_seqlens", "padded [B, T], or packed [N] with cu_seqlens"
            )
        rows, width = x.shape
        cu_seqlens = boundaries(rows, width, x.device)
    else:
        if x.dim() != 1:
            raise wrong(name, f"shape {list(x.shape)} with cu_seqlens", "packed [N]")
        cu_seqlens, width = _as_boundaries(cu_seqlens, x), None
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise wrong("mask", f"dtype {mask.dtype}", "torch.bool (mask.bool() if it holds zeros and ones)")
        if mask.shape != x.shape:
            raise wrong("mask", f"shape {list(mask.shape)}", f"the shape of {name}, {list(x.shape)}")
        if mask.device != x.device:
            raise wrong("mask", f"device {mask.device}", f"the device of {name}, {x.device}")
        mask = _contiguous(mask.reshape(-1), torch.bool)
    return Layout(x.shape, cu_seqlens, mask, width)


def _as_boundaries(cu_seqlens: Tensor, x: Tensor) -> Tensor:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise wrong("cu_seqlens", f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}", "int32 or int64 [S + 1]")
    if cu_seqlens.device != x.device:
        raise wrong("cu_seqlens", f"device {cu_seqlens.device}", f"the device of the tokens, {x.device}")
    if values_known(cu_seqlens):
        # On a GPU this would be a host sync; there the kernels clamp every boundary to [0, N] instead.
        steps = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != x.numel() or (steps < 0).any():
            raise wrong(
                "cu_seqlens", cu_seqlens.tolist(), f"non-decreasing from 0 to the number of tokens, {x.numel()}"
            )
    return _contiguous(cu_seqlens, torch.int64)


def boundaries(rows: int, width: int, device: torch.device) -> Tensor:
    """int64 [rows + 1], of the rows of a padded batch."""
    if width == 0:
        return torch.zeros(rows + 1, dtype=torch.int64, device=device)
    return torch.arange(0, rows * width + 1, width, device=device)
