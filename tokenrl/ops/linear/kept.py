"""What linear_token_logprobs keeps of its forward, so that its backward needs not compute the logits again.

"logits": all of them, [N, V], where they fit into the budget: 6 N D V flops in all, where 8 are without. "directions":
of a frozen head whose log-probs alone have a gradient, hidden's of each of these, [N, D] (directions.py): 4 N D V,
where 6 are without. "nothing" otherwise.
"""

from torch import Tensor

from .directions import has_directions
from .gemm import empty, sum_dtype
from .head import Head, HeadInputs, fitting_tiles, fitting_whole_rows

TILES = 8  # of the budget an 8th is left for the tiles of the gradient


def to_keep(inputs: HeadInputs, wanted: list[bool], logp_alone: bool) -> str:
    """wanted: the gradients of hidden, weight, bias. logp_alone: no result but log-probs will have one."""
    head, rows, budget = inputs.head(None), inputs.hidden.shape[0], inputs.memory_budget
    if any(wanted) and logits_fit(head, rows, budget):
        return "logits"
    frozen = wanted[0] and not wanted[1] and not wanted[2]
    if logp_alone and frozen and inputs.ids.shape[1] == 1 and has_directions(head, rows, budget):
        return "directions"
    return "nothing"


def logits_fit(head: Head, rows: int, budget: int) -> bool:
    """With the sums of the gradient of hidden and its tiles."""
    free = budget - budget // TILES - gradient_sums(head, rows)
    return fitting_whole_rows(head, free) >= rows and fitting_tiles(head, rows, budget // TILES) is not None


def gradient_sums(head: Head, rows: int) -> int:
    """Bytes of a copy of hidden and of the sum of its gradient."""
    return rows * head.weight.shape[1] * (head.dtype.itemsize + sum_dtype(head.dtype).itemsize)


def kept_memory(inputs: HeadInputs, keep: str) -> Tensor:
    """Where it is kept; nothing, (0,)."""
    hidden, vocab = inputs.hidden, inputs.weight.shape[0]
    if keep == "logits":
        return empty(hidden.shape[0] * vocab, hidden, inputs.dtype).view(-1, vocab)
    return hidden.new_zeros(hidden.shape if keep == "directions" else (0,), dtype=sum_dtype(inputs.dtype))
