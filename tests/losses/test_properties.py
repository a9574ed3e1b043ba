"""What must hold for any batch: layouts, orders, splits and masked cells do not change what is computed."""

import pytest
import torch
from cases import PAIRS, WEIGHED, backends_to_test, batch, gates_under_test, interpreted, on_backends, packed, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenrl
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.objectives.statistics import FLOWS

GATES = gates_under_test()
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
SIZES = {"seed": st.integers(0, 10**6), "rows": st.integers(2, 7), "width": st.integers(3, 24)}


def made(gate, pair, aggregation="token-mean"):
    statistic, flow = pair
    gate = GATES[gate]
    return tokenrl.Objective("under test", statistic, gate, aggregation, "", flow=flow, clamp=3.0, cap=2.5)


OBJECTIVES = st.one_of(st.sampled_from(WEIGHED), st.builds(made, st.sampled_from(list(GATES)), st.sampled_from(PAIRS)))
# The padded width is not a property of a packed batch, so the mode that divides by it gets its normalizer.
MODES = st.sampled_from([(mode, 12.5 if a.over_width else None) for mode, a in AGGREGATIONS.items()])


def for_all(backend, check, **strategies):
    """Runs check on random examples; few where a backend is simulated, and these small where it is interpreted."""
    if interpreted(backend):
        strategies |= {"rows": st.integers(2, 4), "width": st.integers(3, 9)}
    examples = 20 if backend in ("reference", "cpu") else 3
    settings(max_examples=examples, derandomize=True, deadline=None, database=None)(given(**strategies)(check))()


def same(got, expected):
    for name, a, b in zip(("loss", "gradient", "metrics"), got, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def fp64(objective, case, backend, **more):
    return run(objective, case, backend, torch.float64, **more)


def token_advantages(case, seed):
    """The case with an advantage per token, NaN in masked cells."""
    a = torch.randn(case["mask"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return case | {"advantages": torch.where(case["mask"], a, torch.nan)}


def widened(case, seed, extra):
    """The case with `extra` masked cells more in each row, at random places, full of NaN and junk."""
    g = torch.Generator().manual_seed(seed)
    rows, width = case["mask"].shape
    places = torch.rand(rows, width + extra, generator=g).argsort(1)[:, :width].sort(1).values
    out = dict(case)
    for name, value in case.items():
        if value.shape == (rows, width):
            junk = torch.nan if value.is_floating_point() else False if value.dtype == torch.bool else 10**9
            out[name] = torch.full((rows, width + extra), junk, dtype=value.dtype).scatter(1, places, value)
    return out, places


def packed_apart(case):
    """The batch packed; not one with as many tokens as sequences, where [N] advantages are one per token by rule."""
    flat = packed(case)
    assume(flat["logp"].numel() != case["mask"].shape[0])
    return flat


@EVERY_BACKEND
def test_padded_equals_packed(backend):
    def check(seed, rows, width, objective, mode, per_token):
        case = batch(seed, rows, width)
        case = token_advantages(case, seed) if per_token else case
        more = {"aggregation": mode[0], "normalizer": mode[1]}
        loss, grad, raw = fp64(objective, case, backend, **more)
        flat = packed_apart(case)
        cells = torch.arange(width) < flat["cu_seqlens"].diff()[:, None]
        same(fp64(objective, flat, backend, **more), (loss, grad[cells], raw))
        assert grad[~cells].count_nonzero() == 0

    for_all(backend, check, **SIZES, objective=OBJECTIVES, mode=MODES, per_token=st.booleans())


@EVERY_BACKEND
def test_permuted_sequences_permute_the_gradient(backend):
    def check(seed, rows, width, objective, mode):
        case = batch(seed, rows, width)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        more = {"aggregation": mode[0], "normalizer": mode[1]}
        loss, grad, raw = fp64(objective, case, backend, **more)
        moved = {name: value[order] for name, value in case.items()}
        same(fp64(objective, moved, backend, **more), (loss, grad[order], raw))
        flat = packed_apart(moved)
        cells = torch.arange(width) < flat["cu_seqlens"].diff()[:, None]
        same(fp64(objective, flat, backend, **more), (loss, grad[order][cells], raw))

    for_all(backend, check, **SIZES, objective=OBJECTIVES, mode=MODES)


def insertion(objective, backend, case, seed, extra, mode):
    more = {"aggregation": mode[0], "normalizer": mode[1]}
    loss, grad, raw = fp64(objective, case, backend, **more)
    wide, places = widened(case, seed, extra)
    expected = grad.new_zeros(wide["mask"].shape).scatter(1, places, grad)
    got = fp64(objective, wide, backend, **more)
    same(got, (loss, expected, raw))
    assert got[1][~wide["mask"]].count_nonzero() == 0


@on_backends(tokenrl.OBJECTIVES, start=1)
def test_masked_cells_inserted_into_a_row_of_the_table_change_nothing(name, backend):
    for seed in range(5 if backend in ("reference", "cpu") else 1):
        case = batch(seed, rows=4, width=8) if interpreted(backend) else batch(seed)
        case = token_advantages(case, seed)
        if name == "real":
            case = {key: x for key, x in batch(seed).items() if key not in ("token_weight", "segment_ids")}
        insertion(name, backend, case, seed, 7, ("group-mean", None) if name == "real" else ("token-mean", None))


@EVERY_BACKEND
def test_masked_cells_inserted_change_nothing(backend):
    def check(seed, rows, width, objective, extra, mode):
        insertion(objective, backend, batch(seed, rows, width), seed, extra, mode)

    for_all(backend, check, **SIZES, objective=OBJECTIVES, extra=st.integers(1, 30), mode=MODES)


def global_count(case, mode):
    """What a mode divides by, counted over the whole batch in plain Python."""
    n = case["mask"].sum(1).tolist()
    groups = {g for g, count in zip(case["group_ids"].tolist(), n, strict=True) if count}
    units = {"tokens": sum(n), "rows": sum(count > 0 for count in n), "groups": len(groups), "one": None}
    count = units[AGGREGATIONS[mode].unit]
    return count * case["mask"].shape[1] if AGGREGATIONS[mode].over_width else count


@EVERY_BACKEND
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_micro_batches_with_the_global_normalizer_add_up(mode, backend):
    def check(seed, rows, width, objective, cut, as_tensor):
        case = batch(seed, rows, width)
        order = case["group_ids"].argsort(stable=True)
        case = {name: value[order] for name, value in case.items()}
        starts = [0] + [i for i in range(1, rows) if case["group_ids"][i] != case["group_ids"][i - 1]]
        if not AGGREGATIONS[mode].by_group:
            starts = list(range(rows))
        cut = starts[cut % len(starts)]
        count = global_count(case, mode)
        if count is not None and as_tensor:
            count = torch.tensor(count)
        loss, grad, raw = fp64(objective, case, backend, aggregation=mode)
        parts = [{name: value[some] for name, value in case.items()} for some in (slice(0, cut), slice(cut, rows))]
        results = [fp64(objective, part, backend, aggregation=mode, normalizer=count) for part in parts]
        same((sum(r[0] for r in results), torch.cat([r[1] for r in results])), (loss, grad))

    sizes = SIZES | {"cut": st.integers(0, 6), "as_tensor": st.booleans()}
    for_all(backend, check, **sizes, objective=OBJECTIVES)


@EVERY_BACKEND
def test_equal_segment_ids_are_none(backend):
    def check(seed, rows, width, objective, value):
        case = batch(seed, rows, width)
        case["segment_ids"] = torch.full((rows, width), value) + torch.arange(rows)[:, None]
        whole = {name: v for name, v in case.items() if name != "segment_ids"}
        same(fp64(objective, case, backend), fp64(objective, whole, backend))
        one, other = packed_apart(case), packed_apart(whole)
        same(fp64(objective, one, backend, normalizer=3.0), fp64(objective, other, backend, normalizer=3.0))

    for_all(backend, check, **SIZES, objective=OBJECTIVES, value=st.integers(-(2**40), 2**40))


@EVERY_BACKEND
def test_segments_of_one_token_turn_any_statistic_into_token(backend):
    def check(seed, rows, width, gate, pair):
        case = batch(seed, rows, width)
        case["segment_ids"] = torch.arange(width).expand(rows, width)
        statistic, flow = pair
        alone = tokenrl.objective(made(gate, pair), clamp=float("inf"))
        token = tokenrl.objective(alone, statistic="token", flow=FLOWS["token"][0])
        same(fp64(alone, case, backend), fp64(token, case, backend))

    for_all(backend, check, **SIZES, gate=st.sampled_from(list(GATES)), pair=st.sampled_from(PAIRS))


@EVERY_BACKEND
def test_what_masked_cells_hold_reaches_nothing(backend):
    def check(seed, rows, width, objective, junk):
        clean = token_advantages(batch(seed, rows, width, poison=False), seed)
        clean["advantages"] = clean["advantages"].nan_to_num(0.0)
        hidden = ~clean["mask"]
        dirty = {}
        for name, value in clean.items():
            per_token = value.shape == hidden.shape and name != "mask"
            dirty[name] = value.masked_fill(hidden, junk if value.is_floating_point() else -1) if per_token else value
        loss, grad, raw = fp64(objective, dirty, backend)
        assert loss.isfinite() and grad.isfinite().all() and grad[hidden].count_nonzero() == 0
        same((loss, grad, raw), fp64(objective, clean, backend))

    junk = st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e300])
    for_all(backend, check, **SIZES, objective=OBJECTIVES, junk=junk)


@EVERY_BACKEND
def test_masked_bounds_per_token_reach_nothing(backend):
    names = {"log_band": 3, "ppo_clip": 3, "cispo": 2, "sapo": 2, "kl_k3": 1, "kl_k3_unbiased": 1}

    def check(seed, rows, width, junk, pair, gate):
        case = batch(seed, rows, width)
        g = torch.Generator().manual_seed(seed)
        bounds = [0.1 + torch.rand(rows, width, dtype=torch.float64, generator=g) for _ in range(names[gate])]
        results = []
        for fill in (0.5, junk):
            filled = [bound.masked_fill(~case["mask"], fill) for bound in bounds]
            changed = dict(zip(GATES[gate].names, filled, strict=False))
            results.append(fp64(tokenrl.objective(made(gate, pair), **changed), case, backend))
        same(*results)
        assert results[1][1][~case["mask"]].count_nonzero() == 0

    junk = st.sampled_from([float("nan"), float("inf"), -1e300])
    for_all(backend, check, **SIZES, junk=junk, pair=st.sampled_from(PAIRS), gate=st.sampled_from(list(names)))
