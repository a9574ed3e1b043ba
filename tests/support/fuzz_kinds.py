"""What `make fuzz` tries: kinds of calls as dictionaries of plain values, which hypothesis draws and shrinks, and the
check of one call on a backend against the fp64 reference.

By the one tolerance rule, and a few ulps of what is summed: among thousands of small cases the base is exact by chance,
or a sum is next to nothing, and shrinking would find just these.
"""

import contextlib

import linear_cases
import linear_policy_cases
import logit_cases
import sim
import torch
from cases import PAIRS, WEIGHED, batch, check, gates_under_test, packed, run
from hypothesis import assume
from hypothesis import strategies as st

import tokenrl
from tokenrl.instruments.parity import tolerance
from tokenrl.logprobs.from_logits import OUTPUTS
from tokenrl.objectives.aggregations import AGGREGATIONS

GATES = gates_under_test()
ULPS = 64
EDGE = 1e-5  # what moves no clip decision: at an edge of a gate the derivative jumps
OBJECTIVES = st.sampled_from(WEIGHED) | st.tuples(st.sampled_from(sorted(GATES)), st.sampled_from(PAIRS))
AGGREGATION = st.none() | st.sampled_from(sorted(AGGREGATIONS))
SEED, FLAG = st.integers(0, 2**16), st.booleans()
TRANSFORM = {
    "temperature": st.sampled_from([1.0, 0.3, 2.5]),
    "softcap": st.sampled_from([None, None, 5.0]),
    "logit_scale": st.sampled_from([1.0, 0.5]),
}


@contextlib.contextmanager
def patience(scale):
    """scale: of the summands of a gradient; those of a number are about 1."""
    errors = tolerance.errors

    def patient(kernel, truth, base):
        summands = scale if truth.numel() > 9 else max(scale, 1.0)
        more = ULPS * torch.finfo(kernel.dtype).eps * summands
        return [(norm, error, allowed + more * (1.0 if norm == "max" else truth.numel() ** 0.5))
                for norm, error, allowed in errors(kernel, truth, base)]  # fmt: skip

    tolerance.errors = patient
    try:
        yield
    finally:
        tolerance.errors = errors


def row_of(objective):
    """A row of the table by its name, or one of a gate, a statistic and a flow."""
    if isinstance(objective, str):
        return tokenrl.objective(objective)
    gate, (statistic, flow) = objective
    return tokenrl.Objective("made", statistic, GATES[gate], "seq-mean-token-mean", "fuzz", flow=flow, cap=1.0)


def check_objective(
    backend,
    objective,
    seed,
    rows,
    width,
    dtype,
    pack,
    poison,
    spread,
    segments,
    weights,
    per_token,
    aggregation,
    counted,
):
    row, case = row_of(objective), batch(seed, rows, width, poison)
    case["old_logp"] = torch.where(case["mask"], case["logp"] - (case["logp"] - case["old_logp"]) * spread, torch.inf)
    if per_token:
        g = torch.Generator().manual_seed(seed)
        case["advantages"] = torch.randn(rows, width, generator=g).round(decimals=2).double()
    for name, wanted in (("segment_ids", segments), ("token_weight", weights)):
        if not wanted:
            del case[name]
    case, more = packed(case) if pack else case, {"aggregation": aggregation, "normalizer": 7.0 if counted else None}
    over_width = AGGREGATIONS[aggregation or row.aggregation].over_width
    assume(counted or not (pack and over_width))
    moved = (case | {"logp": case["logp"] + step} for step in (-EDGE, EDGE))
    low, high = (run(row, one, "reference", torch.float64, **more)[2][4:7] for one in moved)
    assume(torch.equal(low, high))
    with patience(1 / (rows * width)):
        check(row, case, backend, getattr(torch, dtype), **more)


def view_of(logits, how):
    """The same logits in a view with other strides."""
    if how == "columns":
        return torch.cat([logits, logits], -1)[..., : logits.shape[-1]]
    if how == "every second row":
        return torch.stack([logits, -logits], -2).flatten(-3, -2)[..., ::2, :]
    if how == "vocabulary first":
        return logits.movedim(-1, 0).contiguous().movedim(0, -1)
    return logits


def check_logprobs(backend, seed, rows, vocab, k, dtype, view, scale, keep, ignored, outputs, **transform):
    logits, ids = logit_cases.make(*rows, vocab, dtype=getattr(torch, dtype), k=k, seed=seed, scale=scale)
    g = torch.Generator().manual_seed(seed)
    if keep:
        transform["keep_mask"] = torch.rand(vocab, generator=g) < 0.7
        transform["keep_mask"][ids.unique()] = True
    ids[torch.rand(ids.shape, generator=g) < ignored] = -100
    with patience(max(scale, 1) / transform["temperature"]):  # a rounding of a logit moves its probability by so much
        logit_cases.check(view_of(logits, view), ids, backend, outputs=outputs, **transform)


def check_linear_logprobs(backend, seed, rows, vocab, dim, dtype, bias, tile, ignored, **transform):
    case = linear_cases.make(*rows, width=dim, vocab=vocab, dtype=getattr(torch, dtype), seed=seed, bias=bias)
    g, ids = torch.Generator().manual_seed(seed), case[3]
    ids[torch.rand(ids.shape, generator=g) < ignored] = -100
    budget = linear_cases.budget_of(case[1], tile) if tile else None
    with patience(1 / transform["temperature"]):
        linear_cases.check(*case, backend, memory_budget=budget, **transform)


def check_linear_policy(
    backend,
    objective,
    seed,
    rows,
    width,
    dim,
    vocab,
    pack,
    segments,
    weights,
    aggregation,
    kl,
    bonus,
    chunk,
    **transform,
):
    row, made = row_of(objective), linear_policy_cases
    case = made.make(seed, rows, width, dim, vocab, **transform)
    drop = [name for name, wanted in (("segment_ids", segments), ("token_weight", weights)) if not wanted]
    case, more = made.without(case, *drop), {"aggregation": aggregation}
    assume(not (pack and AGGREGATIONS[aggregation or row.aggregation].over_width))
    case = made.packed(case) if pack else case
    tokens = made.without(case, *made.HEAD, *made.TRANSFORM, "ids", "ref_logp") | {"mask": made.valid(case)}
    moved = (tokens | {"logp": case["logp"] + step} for step in (-EDGE, EDGE))
    low, high = (made.decisions(row, one, **more) for one in moved)
    assume(torch.equal(low, high))
    budget = made.budget_of(case, chunk) if chunk else None
    more |= {"kl": kl, "kl_coef": 0.3, "entropy_coef": 0.1 if bonus else 0.0, "memory_budget": budget}
    with patience(4 / transform["temperature"] / (rows * width)):  # weights of the head and of tokens are about 2
        made.check(row, case, backend, torch.float32, **more)


SHAPE = st.tuples(st.integers(1, 7)) | st.tuples(st.integers(1, 3), st.integers(1, 5))
BATCH = {
    "objective": OBJECTIVES, "seed": SEED, "rows": st.integers(2, 9), "pack": FLAG, "segments": FLAG, "weights": FLAG,
    "aggregation": AGGREGATION,
}  # fmt: skip
KINDS = {
    "objective": (check_objective, BATCH | {
        "width": st.integers(3, 70), "dtype": st.sampled_from(["float32", "float64"]), "poison": FLAG,
        "spread": st.sampled_from([1.0, 0.1, 5.0]), "per_token": FLAG, "counted": FLAG,
    }),
    "logprobs": (check_logprobs, TRANSFORM | {
        "seed": SEED, "rows": SHAPE, "vocab": st.integers(1, 600), "k": st.none() | st.integers(1, 4),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]), "scale": st.sampled_from([3.0, 0.1, 30.0]),
        "view": st.sampled_from(["as it is", "columns", "every second row", "vocabulary first"]), "keep": FLAG,
        "ignored": st.sampled_from([0.0, 0.3]),
        "outputs": st.lists(st.sampled_from(OUTPUTS), min_size=1, unique=True),
    }),
    "linear_logprobs": (check_linear_logprobs, TRANSFORM | {
        "seed": SEED, "rows": SHAPE, "vocab": st.integers(2, 700), "dim": st.integers(1, 40), "bias": FLAG,
        "dtype": st.sampled_from(["float32", "bfloat16"]), "tile": st.none() | st.integers(1, 9),
        "ignored": st.sampled_from([0.0, 0.3]),
    }),
    "linear_policy": (check_linear_policy, BATCH | TRANSFORM | {
        "width": st.integers(3, 30), "dim": st.integers(1, 20), "vocab": st.integers(2, 300),
        "kl": st.sampled_from(linear_policy_cases.KL_ROWS), "bonus": FLAG, "chunk": st.none() | st.integers(3, 90),
    }),
}  # fmt: skip


def reproduce(kind, backend, **case):
    """The check of one case."""
    if backend == "sim":
        sim.register()
    try:
        KINDS[kind][0](backend, **case)
    except ValueError as error:  # what fits is a matter of the head's shape
        assume(not str(error).startswith("memory_budget: got"))
        raise
