"""The valid tokens of a batch, taken out of their cells and put back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import wrong
from .checks import as_float64, check_constant, check_number
from .layout import Layout, layout_of

HOLES = ("skip", "count")  # what a masked cell is to a distance in tokens: nothing, or a step


@dataclass(frozen=True)
class ValidTokens:
    """The M valid tokens of a batch in order. cells: int64 [M], where they are among all N; row: [M], whose they are.
    What a masked cell holds is never read."""

    layout: Layout
    cells: Tensor
    row: Tensor

    def take(self, name: str, x: Tensor) -> Tensor:
        self.layout.check_tokens(name, x)
        return as_float64(name, x, self.layout.shape, self.cells).reshape(-1)[self.cells]

    def put(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(self.layout.num_tokens, dtype=dtype, device=x.device)
        out[self.cells] = x.to(dtype)
        return out.view(self.layout.shape)

    def following(self, x: Tensor, distance: int = 1) -> Tensor:
        """x of the valid token `distance` further in the same sequence, 0 past its end."""
        out = torch.zeros_like(x)
        same = self.row[distance:] == self.row[:-distance]
        out[: x.numel() - distance] = torch.where(same, x[distance:], 0.0)
        return out

    def suffix_sums(self, x: Tensor, factor: float | Tensor) -> Tensor:
        """y_t = x_t + factor y_{t+1} inside each sequence, factor a number or one per row, [M], in log2 steps: after
        the step of `distance`, y_t holds its first 2 distance terms. Only products with powers, no division by them, so
        that factor 0.9 over 10k tokens is exact."""
        longest = min(self.layout.width or x.numel(), x.numel())
        distance = 1
        while distance < longest:
            x = x + factor**distance * self.following(x, distance)
            distance *= 2
        return x


def valid_tokens(layout: Layout) -> ValidTokens:
    cells = layout.valid().nonzero()[:, 0]
    return ValidTokens(layout, cells, layout.rows()[cells])


def valid_of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, name: str) -> ValidTokens:
    return valid_tokens(layout_of(x, mask=mask, cu_seqlens=cu_seqlens, name=name))


def per_token(name: str, x: float | Tensor, valid: ValidTokens) -> Tensor:
    """fp64, [M] or 0-d."""
    if not isinstance(x, Tensor):
        check_number(name, x)
        return torch.tensor(float(x), dtype=torch.float64, device=valid.cells.device)
    check_constant(name, x)
    rows = valid.layout.num_sequences
    if x.shape not in ((), (rows,)) or x.device != valid.cells.device:
        raise wrong(name, f"shape {list(x.shape)} on {x.device}", f"a number, 0-d or [{rows}], on the tokens' device")
    return x.double()[valid.row] if x.dim() else x.double()
