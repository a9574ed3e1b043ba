"""SPO against its official outputs (cut points, segments, whitening, actor loss, tree) and against loops."""

import functools
import math

import pytest
import torch
from cases import backends_to_test, device_of
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import advantages as adv
from tokenrl.objectives.gates.base import INF as OFF

CASES = INDEX["spo"]["cases"]


def cases(kind):
    return [case for case in CASES if case.startswith(kind + ".")]


def test_what_is_left_out():
    left = set(CASES) - {c for kind in ("segment_advantage", "whiten", "actor_loss", "tree_edges") for c in cases(kind)}
    print(f"left out: {', '.join(sorted(left))}: DVO, another objective of the same repository")
    assert left == {"dvo.0"}


@pytest.mark.parametrize("case", cases("segment_advantage"))
def test_golden_chain(case):
    x, config = arrays("spo", case), CASES[case]["config"]
    old_logp, threshold = x["old_logp"][None], config["prob_threshold"]
    cuts = adv.spo_cutpoints(old_logp, threshold=threshold, interval=config["cutpoint_interval"])
    assert torch.equal(cuts.positions[0] - 1, x["cutpoints"].long())
    values, score = x["cutpoint_values"][None], x["score"][None]
    near(adv.spo_chain(values, score, cuts.segment_ids, old_logp, threshold=threshold)[0], x["advantages_out"], case)


@pytest.mark.parametrize("case", cases("whiten"))
def test_golden_whiten(case):
    x = arrays("spo", case)
    unsure = adv.spo_mask(x["old_logp"], x["mask"]) if CASES[case]["config"]["use_prob_mask"] else x["mask"]
    assert unsure.any() and not (unsure & ~x["mask"]).any()
    # The official n / (n - 1) is in fp32: the variance that it gives is exact, that of our own to its rounding.
    n = unsure.sum().float()
    mean, var = x["advantages"][unsure].mean(), x["advantages"][unsure].var(unbiased=False) * (n / (n - 1)).double()
    expected = x["advantages_out"][unsure]
    near(adv.whiten(x["advantages"], unsure, mean=mean, var=var)[unsure], expected, case)
    torch.testing.assert_close(adv.whiten(x["advantages"], unsure)[unsure], expected, rtol=0, atol=1e-7)


def penalty(x, config, logp):
    """The authors' KL: a mean over rows of sums over the tokens that have a loss."""
    kind = config["kl_penalty_loss_type"]
    if kind is None:
        return 0.0
    ref_logp, mask = x["ref_logp"].to(logp.device), x["action_mask"].to(logp.device)
    if kind == "control_variate":
        row = tokenrl.objective("kl_k3", ceiling=10000.0, clamp=OFF, aggregation="seq-mean-token-sum")
        loss, _ = tokenrl.policy_loss(row, logp, ref_logp, None, mask=mask, normalizer=len(logp), backend="reference")
        return config["kl_coef"] * loss
    print("the KL term in torch: it is k1 clamped to [0, 10000], and kl_k1 has no bounds")
    return config["kl_coef"] * torch.where(mask, logp - ref_logp, 0.0).clamp(0, 10000).sum(1).mean()


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("case", cases("actor_loss"))
def test_golden_actor_loss(case, backend):
    x, entry = arrays("spo", case), CASES[case]
    config, device = entry["config"], device_of(backend)
    mask = adv.spo_mask(x["old_logp"], x["mask"]) if config["use_prob_mask"] else x["mask"]
    assert torch.equal(mask, x["action_mask"])
    logp, old_logp, advantages, mask = (
        t.to(device) for t in (x["logp"], x["old_logp"], x["advantages"], mask)
    )  # fmt: skip
    logp.requires_grad_()
    row = tokenrl.objective("ppo", clamp=10.0, eps_low=config["cliprange"], eps_high=config["cliprange"])
    loss, metrics = tokenrl.policy_loss(row, logp, old_logp, advantages, mask=mask, backend=backend)
    assert metrics.ratio_mean == pytest.approx(entry["metrics"]["actor/ratio"], rel=1e-6)
    skipped = metrics.ratio_mean > config["ratio_threshold"]
    assert skipped == config["skipped"]
    loss = loss * (not skipped) + penalty(x, config, logp)
    near(loss, x["loss"], "loss")
    near(torch.autograd.grad(loss, logp)[0], x["grad_logp"], "gradient")


@pytest.mark.parametrize("case", cases("tree_edges"))
def test_golden_tree(case):
    x, method = arrays("spo", case), CASES[case]["config"]["adv_method"]
    leaves = x["leaf_rewards"]
    n, m = leaves.shape
    parents = torch.cat([torch.tensor([-1]), torch.zeros(n).long(), torch.arange(1, n + 1).repeat_interleave(m)])
    values = torch.cat([torch.full((n + 1,), torch.nan, dtype=torch.float64), leaves.reshape(-1)])
    edges = adv.spo_tree(values, parents, method=method)
    assert edges.kept.tolist() == [False, *x["kept_level1"].tolist(), *x["kept_level2"].reshape(-1).tolist()]
    expected = torch.cat([x["advantage_level1"], x["advantage_level2"].reshape(-1)])
    near(edges.advantages[1:], expected, case)
    near(edges.values[1 : n + 1], leaves.mean(1), "values")


def random_batch(seed=0, rows=7, width=23):
    """Holes, an empty row, a row of one token; masked cells hold NaN."""
    g = torch.Generator().manual_seed(seed)
    old_logp = torch.rand(rows, width, generator=g, dtype=torch.float64).mul(0.5).add(0.5).log()
    mask = torch.rand(rows, width, generator=g) < 0.8
    mask[1], mask[2] = False, torch.arange(width) == 4
    old_logp[2, 4] = math.log(0.5)
    return old_logp.masked_fill(~mask, torch.nan), mask, g


def cuts_by_hand(old_logp, mask, threshold, interval):
    """(positions, segment ids) of a row."""
    seen, positions, ids = 0, [], []
    for j, valid in enumerate(mask.tolist()):
        if valid and math.exp(old_logp[j]) < threshold:
            if seen % interval == 0:
                positions.append(j)
            seen += 1
        ids.append(len(positions) - 1 if valid else -1)
    return positions, ids


@pytest.mark.parametrize("threshold, interval", [(0.9, 5), (0.9, 1), (0.6, 2), (0.9, 100), (1.0, 3)])
def test_chain(threshold, interval):
    old_logp, mask, g = random_batch(interval)
    cuts = adv.spo_cutpoints(old_logp, mask, threshold=threshold, interval=interval)
    rows = [cuts_by_hand(*row, threshold, interval) for row in zip(old_logp, mask, strict=True)]
    most = max(len(positions) for positions, _ in rows)
    assert cuts.positions.tolist() == [p + [-1] * (most - len(p)) for p, _ in rows]
    assert cuts.segment_ids.tolist() == [ids for _, ids in rows]
    values = torch.rand(len(rows), most, generator=g, dtype=torch.float64).masked_fill(cuts.positions < 0, torch.nan)
    score = torch.rand(len(rows), generator=g, dtype=torch.float64)
    expected, kept = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for i, (positions, ids) in enumerate(rows):
        states = [*values[i, : len(positions)].tolist(), float(score[i])]
        for j, k in enumerate(ids):
            if k >= 0:
                kept[i, j] = states[k + 1] - states[k]
                expected[i, j] = kept[i, j] if math.exp(old_logp[i, j]) <= threshold else 0.0
    chain = functools.partial(adv.spo_chain, values, score, cuts.segment_ids, old_logp, mask)
    assert torch.equal(chain(threshold=threshold), expected) and torch.equal(chain(threshold=None), kept)
    assert torch.equal(adv.spo_mask(old_logp, mask, threshold=threshold), mask & (old_logp.exp() < threshold))


def test_segments_of_ones_own():
    old_logp, ids = torch.zeros(1, 6), torch.tensor([[-1, 0, 0, 1, 1, 2]])
    values = torch.tensor([[0.25, 0.5, 0.0]])
    a = adv.spo_chain(values, torch.tensor([1.0]), ids, old_logp, threshold=None)
    assert a.dtype == torch.float32 and a.tolist() == [[0.0, 0.25, 0.25, -0.5, -0.5, 1.0]]
    assert not adv.spo_chain(values, torch.tensor([1.0]), ids, old_logp).any()


def test_packed_is_padded_and_parts_are_the_whole():
    old_logp, mask, g = random_batch()
    width = mask.shape[1]
    cells = torch.arange(width) < torch.where(mask, torch.arange(1, width + 1), 0).amax(1)[:, None]
    flat = (old_logp[cells], mask[cells])
    given = {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int32), cells.sum(1).cumsum(0).int()])}
    cuts, packed = adv.spo_cutpoints(old_logp, mask, interval=2), adv.spo_cutpoints(*flat, interval=2, **given)
    assert torch.equal(packed.positions, cuts.positions)
    assert torch.equal(packed.segment_ids, cuts.segment_ids[cells])
    values, score = torch.rand(*cuts.positions.shape, generator=g), torch.rand(len(mask), generator=g)
    whole = adv.spo_chain(values, score, cuts.segment_ids, old_logp, mask)
    assert torch.equal(adv.spo_chain(values, score, packed.segment_ids, *flat, **given), whole[cells])
    assert torch.equal(adv.spo_mask(*flat, **given), adv.spo_mask(old_logp, mask)[cells])
    for p in (slice(0, 3), slice(3, 7)):
        own = adv.spo_cutpoints(old_logp[p], mask[p], interval=2)
        assert torch.equal(own.segment_ids, cuts.segment_ids[p])
        assert torch.equal(adv.spo_chain(values[p], score[p], own.segment_ids, old_logp[p], mask[p]), whole[p])


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_cells_are_not_read(garbage):
    old_logp, mask, _ = random_batch()
    clean, dirty = old_logp.masked_fill(~mask, -1.0), old_logp.masked_fill(~mask, garbage)
    cuts, found = adv.spo_cutpoints(clean, mask), adv.spo_cutpoints(dirty, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, cuts, strict=True))
    values = torch.arange(cuts.positions.numel()).double().view(cuts.positions.shape)
    ids = found.segment_ids.masked_fill(~mask, 10**9)
    a = adv.spo_chain(values, values[:, 0], ids, dirty, mask)
    assert torch.equal(a, adv.spo_chain(values, values[:, 0], cuts.segment_ids, clean, mask)) and a.any()
    assert not a[~mask].any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_cut(shape):
    mask, old_logp = torch.zeros(shape, dtype=torch.bool), torch.full(shape, torch.nan)
    sure = torch.zeros(shape)
    for given in ((old_logp, mask), (sure, None)):
        cuts = adv.spo_cutpoints(*given)
        assert cuts.positions.shape == (shape[0], 0) and (cuts.segment_ids == -1).all()
        a = adv.spo_chain(torch.zeros(shape[0], 0), torch.ones(shape[0]), cuts.segment_ids, *given)
        assert a.shape == shape and not a.any() and not adv.spo_mask(*given).any()


def test_probabilities_at_the_threshold():
    # As in the authors' code such a token is no cut and has no loss, but keeps its advantage.
    old_logp = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    assert adv.spo_mask(old_logp, threshold=0.5).tolist() == [[False, True]]
    assert adv.spo_cutpoints(old_logp, threshold=0.5).positions.tolist() == [[1]]
    ids, v = torch.tensor([[0, 0]]), torch.zeros(1, 1)
    assert adv.spo_chain(v, torch.ones(1), ids, old_logp, threshold=0.5).tolist() == [[1.0, 1.0]]


def tree_by_hand(values, parents, method, inner, eps):
    nodes = range(len(values))
    children = [[k for k in nodes if parents[k] == i] for i in nodes]

    def value(i):
        if inner == "given" or not children[i]:
            return values[i]
        return sum(value(k) for k in children[i]) / len(children[i])

    out = []
    for i in nodes:
        up = parents[i]
        a = 0.0 if up < 0 else value(i) - value(up)
        if up >= 0 and method == "grpo":
            v = [value(k) for k in children[up]]
            a /= math.sqrt(sum((x - sum(v) / len(v)) ** 2 for x in v) / len(v)) + eps
        out.append(a)
    return [value(i) for i in nodes], out


@pytest.mark.parametrize("inner", ["mean", "given"])
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_tree(method, inner):
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        order = torch.randperm(25, generator=g).tolist()
        parents = [-1] * 25  # ragged trees of any depth, parents before and after their children
        for place in range(2 + seed % 2, 25):
            parents[order[place]] = order[int(torch.randint(0, place, (1,), generator=g))]
        values = torch.randn(25, generator=g, dtype=torch.float64)
        expected, advantages = tree_by_hand(values.tolist(), parents, method, inner, 0.1)
        has_children = torch.tensor([i in parents for i in range(25)])
        given = values.masked_fill(has_children, torch.nan) if inner == "mean" else values
        edges = adv.spo_tree(given, torch.tensor(parents), method=method, inner=inner, eps=0.1)
        near(edges.values, torch.tensor(expected, dtype=torch.float64), "values")
        near(edges.advantages, torch.tensor(advantages, dtype=torch.float64), "advantages")
        assert torch.equal(edges.kept, torch.tensor([abs(a) > 1e-12 for a in advantages]))


def test_rounding_is_no_advantage():
    values, parents = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.2]), torch.tensor([-1, 0, 0, 0, -1])
    for method in ("rloo", "grpo"):
        edges = adv.spo_tree(values, parents, method=method)
        assert edges.advantages.dtype == torch.float32
        assert not edges.advantages.any() and not edges.kept.any()
    near_equal = adv.spo_tree(torch.tensor([0.0, 0.5, 0.5 + 2**-20]), torch.tensor([-1, 0, 0]), tolerance=1e-3)
    assert not near_equal.kept.any() and not near_equal.advantages.any()
    assert adv.spo_tree(values[:0], parents[:0]).kept.shape == (0,)


R, IDS, V = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 1)
ERRORS = [
    (lambda: adv.spo_mask(R.bfloat16()), "old_logp: got dtype torch.bfloat16"),
    (lambda: adv.spo_mask(R, threshold=0.0), "threshold: got 0.0, accepted: a probability"),
    (lambda: adv.spo_mask(R.clone().requires_grad_()), "old_logp: got a tensor that requires grad"),
    (lambda: adv.spo_cutpoints(R, interval=0), "interval: got 0, accepted: an integer, at least 1"),
    (lambda: adv.spo_cutpoints(R, R), "mask: got dtype torch.float32"),
    (lambda: adv.spo_chain(V, R[:, 0], IDS + 1, R), "segment_ids: got 1 to 1, accepted: -1 to 0"),
    (lambda: adv.spo_chain(V, R[:, 0], IDS - 2, R), "segment_ids: got -2 to -2"),
    (lambda: adv.spo_chain(V[0], R[:, 0], IDS, R), r"values: got shape \[1\], accepted: \[2, K\]"),
    (lambda: adv.spo_chain(V, R[0], IDS, R), r"rewards: got shape \[3\]"),
    (lambda: adv.spo_chain(V, R[:, 0], R, R), "segment_ids: got dtype torch.float32"),
    (lambda: adv.spo_tree(R[0], IDS[0], method="ppo"), "method: got 'ppo', accepted: rloo, grpo"),
    (lambda: adv.spo_tree(R[0], IDS[0], inner="max"), "inner: got 'max', accepted: mean, given"),
    (lambda: adv.spo_tree(R[0], IDS[0] + 3), "parents: got 3 to 3, accepted: -1 to 2"),
    (lambda: adv.spo_tree(R[0], IDS[0, :2]), r"parents: got \[2\]"),
    (lambda: adv.spo_tree(R[0], torch.tensor([1, 2, 0])), "parents: got a cycle"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
