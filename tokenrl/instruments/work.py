"""What an op has to do at least: bytes that it reads and writes, each once, and exponentials. Matrix products inside of
it are counted by their own shapes.

Of n rows or tokens that take part out of N, V columns and numbers of s bytes:

    token_logprobs      reads n V s; n V exponentials. Backward: reads n V s, writes N V s, n V exponentials again
    objective           reads a log-prob and an old one, a mask; writes a coefficient; an exponential each. Backward:
                        a multiplication
    linear ops          read hidden states and weight, write what they return; their logits are never written
    divergence          reads two heads' logits; an exponential each. Backward: the same, and writes one's gradient
"""

from collections.abc import Callable

from torch import Tensor

from ..ops.kernel_ops import IGNORED, Upstream
from ..ops.linear.divergence import LinearDivergenceInputs
from ..ops.linear.evaluation import LinearPolicyLossInputs
from ..ops.linear.head import HeadInputs
from ..ops.ranges import Range
from .machine_limits import Work

Amount = int | Tensor  # a count of rows stays on the device until it is read
Formula = Callable[[int], Work]


def statistics_of_logits(cells: int, size: int) -> Work:
    """Of so many logits that are read, each of `size` bytes."""
    return Work(cells * size, 0, cells)


def gradient_of_logits(cells: int, size: int, written: int | None = None) -> Work:
    """written: logits whose gradient is written, where that of rows without one is zero."""
    return Work(cells * size, (cells if written is None else written) * size, cells)


def divergence_of_logits(cells: int, size: int) -> Work:
    """Of so many pairs of logits that are read, each of `size` bytes."""
    return Work(cells * size, 0, 2 * cells)


def gradient_of_divergence(cells: int, size: int, written: int) -> Work:
    """written: bytes of one head's gradient."""
    return Work(cells * size, written, 2 * cells)


def objective_of_tokens(tokens: int, size: int, masked: bool) -> Work:
    return Work((2 * size + masked) * tokens, size * tokens, tokens)


def elementwise(tokens: int, read: int, written: int) -> Work:
    """Bytes per token."""
    return Work(read * tokens, written * tokens, 0)


def active_rows(ids: Tensor, dims: int) -> Tensor:
    """How many rows are read: those with an id that is not ignored. dims: of one id a row."""
    used = ids != IGNORED
    return (used.any(-1) if used.dim() > dims else used).sum()


def work_of(range: Range) -> tuple[Formula, Amount] | None:
    """(what gives the work of a number of rows, that number), of a call that is about to begin; None of an op without a
    model."""
    formula = FORMULAS.get((range.op, range.way))
    return formula(range) if formula else None


def _size(range: Range) -> int:
    return range.dtype.itemsize


def _given(*tensors: Tensor | None) -> int:
    """Bytes of these tensors."""
    return sum(x.nbytes for x in tensors if x is not None)


def _logprobs(range: Range) -> tuple[Formula, Amount]:
    logits, ids = range.inputs[:2]
    columns = range.shape[1]
    return lambda rows: statistics_of_logits(rows * columns, _size(range)), active_rows(ids, logits.dim() - 1)


def _logprobs_backward(range: Range) -> tuple[Formula, Amount]:
    _, (logits, ids, *_) = Upstream.read(range.inputs)
    (rows, columns), size = range.shape, _size(range)
    return (
        lambda active: gradient_of_logits(active * columns, size, rows * columns),
        active_rows(ids, logits.dim() - 1),
    )


def _tokens(formula: Callable[[Range, int], Work]) -> Callable[[Range], tuple[Formula, Amount]]:
    """Of an op on all tokens of its shape."""
    return lambda range: (lambda tokens: formula(range, tokens), range.shape[0])


def _head(written: Callable[[Range], int], passes: int) -> Callable[[Range], tuple[Formula, Amount]]:
    """passes: exponentials of each logit of a token that takes part."""

    def found(range: Range) -> tuple[Formula, Amount]:
        hidden, weight, bias, ids, *_ = range.inputs
        read, columns, out = _given(weight, bias), range.shape[2], written(range)
        per_token = hidden.shape[1] * hidden.element_size()
        counted = _policy_mask(range).sum() if range.op == "linear_policy_loss" else active_rows(ids, 1)
        return lambda tokens: Work(read + tokens * per_token, out, passes * tokens * columns), counted

    return found


def _policy_mask(range: Range) -> Tensor:
    return LinearPolicyLossInputs(*range.inputs).active


def _wanted_bytes(range: Range) -> int:
    """Of the gradients that an op from hidden states returns."""
    inputs, rest = HeadInputs.read(range.inputs)
    wanted = next(x for x in rest if isinstance(x, (list, tuple)) and x and isinstance(x[0], bool))
    pairs = zip((inputs.hidden, inputs.weight, inputs.bias), wanted, strict=True)
    return _given(*(x for x, want in pairs if want))


def _rows_of_pair(range: Range, rows: Tensor | None) -> Amount:
    """How many rows of two heads' logits take part."""
    return range.shape[0] if rows is None else rows.sum()


def _divergence(range: Range) -> tuple[Formula, Amount]:
    rows = range.inputs[2 if range.backend == "reference" else 3]  # kernels are given statistics before
    columns, size = range.shape[1], _size(range) + range.inputs[1].element_size()
    return lambda rows: divergence_of_logits(rows * columns, size), _rows_of_pair(range, rows)


def _divergence_backward(range: Range) -> tuple[Formula, Amount]:
    (rows, columns), size = range.shape, _size(range) + range.inputs[2].element_size()
    written = rows * columns * _size(range)
    return (
        lambda active: gradient_of_divergence(active * columns, size, written),
        _rows_of_pair(range, range.inputs[6]),
    )


def _linear_divergence(range: Range) -> tuple[Formula, Amount]:
    inputs = LinearDivergenceInputs(*range.inputs)
    read = _given(inputs.weight, inputs.bias, inputs.other_weight, inputs.other_bias)
    each = sum(x.shape[1] * x.element_size() for x in (inputs.hidden, inputs.other_hidden))
    columns, out = inputs.weight.shape[0] + inputs.other_weight.shape[0], _wanted_bytes(range)
    return lambda tokens: Work(read + tokens * each, out, 2 * tokens * columns), active_rows(inputs.ids, 1)


def _times_upstream(range: Range, tokens: int) -> Work:
    size = _given(*range.inputs)
    return Work(size, size, 0)


def _objective(range: Range, tokens: int) -> Work:
    return objective_of_tokens(tokens, _size(range), range.inputs[3] is not None)


def _log_ratios(range: Range, tokens: int) -> Work:
    masked = range.inputs[2] is not None if len(range.inputs) > 2 else True
    return elementwise(tokens, 2 * _size(range) + masked, _size(range))


FORMULAS: dict[tuple[str, str], Callable[[Range], tuple[Formula, Amount]]] = {
    ("token_logprobs", "forward"): _logprobs,
    ("token_logprobs", "backward"): _logprobs_backward,
    ("objective", "forward"): _tokens(_objective),
    ("objective", "backward"): _tokens(lambda range, n: elementwise(n, _size(range), _size(range))),
    ("statistic", "forward"): _tokens(_log_ratios),
    ("statistic", "backward"): _tokens(lambda range, n: elementwise(n, _size(range) + 1, _size(range))),
    ("position_adaptive_clip", "forward"): _tokens(lambda range, n: elementwise(n, _size(range) + 1, 2 * _size(range))),
    ("position_adaptive_clip", "backward"): _tokens(lambda range, n: elementwise(n, 2 * _size(range), _size(range))),
    ("aggregation_weights", "forward"): _tokens(lambda range, n: elementwise(n, int(range.inputs[0] is not None), 0)),
    ("linear_token_logprobs", "forward"): _head(lambda range: 0, 1),
    ("linear_token_logprobs", "backward"): _head(_wanted_bytes, 1),
    ("linear_policy_loss", "forward"): _head(_wanted_bytes, 2),
    ("linear_policy_loss", "backward"): _tokens(_times_upstream),
    ("divergence", "forward"): _divergence,
    ("divergence", "backward"): _divergence_backward,
    ("linear_divergence", "forward"): _linear_divergence,
    ("linear_divergence", "backward"): _tokens(_times_upstream),
}  # fmt: skip
