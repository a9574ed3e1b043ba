"""linear_policy_loss on every backend: against the reference, against its parts, and against the papers' formulas."""

import functools
import math

import pytest
import torch
from cases import PAIRS, device_of, gates_under_test, kernel_backends
from linear_cases import same_bits
from linear_policy_cases import KL_ROWS, TORCHS, budget_of, check, check_parts, make, packed, run, settled, without

import tokenrl
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.weighted import Cispo
from tokenrl.ops.linear import policy_loss

KERNELS = kernel_backends()
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)
# The interpreter takes a second for a call, the simulation of CUDA a twentieth: they run what differs by kernel.
FAST = pytest.mark.parametrize("backend", [name for name in KERNELS if name != "triton"])
COMPILED = pytest.mark.parametrize("backend", [name for name in KERNELS if name not in ("triton", "sim")])
FLOATS = [torch.float32, torch.float64, torch.bfloat16]
INTERPRETED = ("grpo", "gspo", "gspo_token", "cispo", "sapo", "ctpo", "minpro", "kl_k3")
ROWS = [(name, b, FLOATS[0]) for b in KERNELS for name in (INTERPRETED if b == "triton" else tokenrl.OBJECTIVES)]
ROWS += [(name, "cpu", dtype) for dtype in FLOATS[1:] for name in tokenrl.OBJECTIVES if "cpu" in KERNELS]
SMALL = {"rows": 4, "width": 6}
TERMS = {"ref_logp alone": {}, "kl": {"kl_coef": 0.3}, "kl and entropy": {"kl_coef": 0.3, "entropy_coef": 0.1}}
BOTH = TERMS["kl and entropy"]
FAMILIES = ("grpo", "ctpo", "gspo")


def of_the_table(name, dtype):
    """A batch for a row of the table, far enough from its edges for the dtype."""
    row = tokenrl.OBJECTIVES[name]
    spread = 5.0 if isinstance(row.gate, Cispo) else 3.0 if dtype == torch.bfloat16 else 1.0
    left_out = ("token_weight", "segment_ids") if name == "real" else ()
    case = settled(name, lambda seed: without(make(seed, spread=spread, **SMALL), *left_out), dtype)
    return case if row.gate.uses_advantages else case | {"advantages": None}


@pytest.mark.parametrize("name,backend,dtype", ROWS)
def test_rows_of_the_table(name, backend, dtype):
    found = check(name, of_the_table(name, dtype), backend, dtype)
    assert found["tokens"] > 5 and found["passes"] == 1 and found["left_out"] == 0
    assert all(found[tensor].any() for tensor in ("hidden", "weight", "bias"))


def made(statistic, flow, gate="log_band"):
    return tokenrl.Objective("made", statistic, gates_under_test()[gate], "token-mean", "test", flow=flow, cap=1.0)


@COMPILED
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("statistic,flow", PAIRS)
def test_the_parts_by_statistic_and_term(statistic, flow, terms, backend):
    objective = made(statistic, flow)
    check_parts(objective, settled(objective), backend, **TERMS[terms])


@pytest.mark.skipif("triton" not in KERNELS, reason="no triton")
@pytest.mark.parametrize("pair", [("prefix_mean", "local"), ("span_mean", "through"), ("prefix_min", "local")])
def test_the_parts_in_the_interpreter(pair):
    objective = made(*pair, "ppo_clip")
    case = settled(objective, functools.partial(make, temperature=0.8, softcap=20.0, **SMALL))
    check_parts(objective, case, "triton", **BOTH)


@FAST
@pytest.mark.parametrize("gate", GATES)
def test_the_parts_by_gate(gate, backend):
    objective = made("prefix_mean", "local", gate)
    check_parts(objective, settled(objective), backend, **BOTH)


@COMPILED
@pytest.mark.parametrize("objective", ["cispo", "gspo_token"])
@pytest.mark.parametrize("kl", KL_ROWS)
def test_the_parts_by_row_of_kl(kl, objective, backend):
    check_parts(objective, settled(objective), backend, kl=kl, kl_coef=0.7)


@COMPILED
@pytest.mark.parametrize("changes", [{"ceiling": 0.05}, {"clamp": 0.25}], ids=str)
def test_the_parts_with_a_changed_row_of_kl(changes, backend):
    kl = tokenrl.objective("kl_k3", **changes)
    check_parts("cispo", settled("cispo"), backend, kl=kl, kl_coef=0.7)


@COMPILED
def test_the_parts_with_a_capped_row_of_kl(backend):
    check_parts("cispo", settled("cispo"), backend, kl=tokenrl.objective("kl_k1", cap=0.05), kl_coef=0.7)


@COMPILED
@pytest.mark.parametrize("normalizer", [None, 12.5])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_parts_by_aggregation(aggregation, normalizer, backend):
    more = {"aggregation": aggregation, "normalizer": normalizer}
    case = settled("ctpo", functools.partial(make, rows=8), **more)
    check_parts("ctpo", case, backend, **BOTH, **more)


def per_token_advantages(seed):
    case = make(seed)
    sign = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return case | {"advantages": torch.where(case["mask"], sign, torch.nan)}


def one_token_each(seed):
    flat = without(packed(per_token_advantages(seed)), "segment_ids")
    count = flat["ids"].numel()
    return flat | {"cu_seqlens": torch.arange(count + 1), "group_ids": torch.arange(count) // 3}


def another_ignore_index(seed):
    case = make(seed)
    ignored = case["ids"] == -100
    ids = torch.where(ignored, 7, case["ids"] + (case["ids"] == 7))
    return case | {"ids": ids, "ignore_index": 7}


def keep(*shape):
    kept = torch.rand(*shape, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    kept[..., 45:] = False
    return kept


VARIANTS = {
    "no segments, no weights": lambda seed: without(make(seed), "segment_ids", "token_weight"),
    "no mask, no bias": lambda seed: without(make(seed, poison=False), "mask", "bias"),
    "advantages per token": per_token_advantages,
    "packed": lambda seed: packed(make(seed)),
    "packed without segments": lambda seed: packed(without(make(seed), "segment_ids")),
    "packed, one sequence per token": one_token_each,
    "a temperature": lambda seed: make(seed, temperature=0.7),
    "temperatures": lambda seed: make(seed, temperature=torch.linspace(0.6, 1.8, 54).view(6, 9)),
    "packed temperatures": lambda seed: packed(make(seed, temperature=torch.linspace(0.6, 1.8, 54).view(6, 9))),
    "a softcap": lambda seed: make(seed, softcap=4.0, logit_scale=1.3),
    "a keep_mask": lambda seed: make(seed, keep_mask=keep()),
    "keep_masks": lambda seed: make(seed, keep_mask=keep(6, 9)),
    "another ignore_index": another_ignore_index,
}


@COMPILED
@pytest.mark.parametrize("objective", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_by_layout_and_option(variant, objective, backend):
    check_parts(objective, settled(objective, VARIANTS[variant]), backend, **BOTH)


@EVERY_KERNEL
def test_an_fp32_head_of_16_bit_tensors(backend):
    """As exact as fp32 on the same numbers; the gradients come in the dtypes of their tensors."""
    case = settled("grpo", functools.partial(make, **SMALL), torch.float32)
    found = check("grpo", case, backend, torch.bfloat16, compute_dtype=torch.float32)
    assert all(found[name].dtype == torch.bfloat16 for name in ("hidden", "weight", "bias"))


@FAST
@pytest.mark.parametrize("objective", [*FAMILIES, "gspo_token", "minpro"])
def test_on_policy_is_an_old_logp_equal_to_its_own(objective, backend):
    """What old_logp holds is not read; spans need no second pass where they do not fit into a chunk."""
    case = make(exact=True)
    found = check_parts(objective, case | {"old_logp": case["logp"].nan_to_num()}, backend, **BOTH)
    given = case | {"old_logp": torch.full_like(case["logp"], torch.nan), "on_policy": True}
    ignored = run(objective, given, backend, torch.float32, **BOTH)
    unread = run(objective, case | {"old_logp": None}, backend, torch.float32, **BOTH)
    same_bits(ignored, unread, torchs=TORCHS)
    assert ignored["ratio_min"] == ignored["ratio_max"] == 1
    for name in ("hidden", "weight", "bias", "loss"):
        torch.testing.assert_close(ignored[name], found[name], rtol=1e-4, atol=1e-6)


@COMPILED
@pytest.mark.parametrize("objective", [*FAMILIES, "gspo_token"])
def test_on_policy_spans_need_one_pass_over_any_chunks(objective, backend, monkeypatch):
    monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2)
    case = make() | {"old_logp": None}
    found = check(objective, case, backend, torch.float32, memory_budget=budget_of(case, 3), **BOTH)
    assert found["passes"] == 1


def test_metrics_by_name():
    hidden, weight = torch.zeros(1, 4, 2), torch.zeros(8, 2)
    ids, ref_logp = torch.tensor([[1, 2, 3, -100]]), torch.full((1, 4), -math.log(8) - 0.5)
    _, metrics = tokenrl.linear_policy_loss(
        "ppo", hidden, weight, ids, None, torch.ones(1), ref_logp=ref_logp, kl="kl_k2"
    )
    assert isinstance(metrics, tokenrl.LinearMetrics) and metrics.raw.shape == (16,)
    named = metrics.as_dict()
    assert tuple(named) == metrics.NAMES == (*tokenrl.Metrics.NAMES, "kl", "entropy", "passes", "left_out")
    assert (metrics.tokens, metrics.passes, metrics.left_out, metrics.ratio_mean) == (3, 1, 0, 1.0)
    assert metrics.kl == pytest.approx(0.125) and metrics.entropy == pytest.approx(math.log(8))
    with pytest.raises(AttributeError, match="LinearMetrics has no 'entropies'; it has tokens, .* left_out"):
        _ = metrics.entropies


# The papers on four tokens of one sequence, typed out.
HIDDEN = [[0.3, -0.7], [0.9, 0.2], [-0.4, 0.5], [0.1, 1.1]]
WEIGHT = [[0.5, 0.1], [-0.3, 0.8], [0.2, -0.6]]
IDS = [0, 2, 1, 1]
RATIOS = [1.03, 0.98, 0.7, 1.7]  # e^(logp - old_logp) of the tokens


def softmax(h):
    z = [sum(w * x for w, x in zip(row, h, strict=True)) for row in WEIGHT]
    total = sum(math.exp(x) for x in z)
    return [math.exp(x) / total for x in z]


def grpo(advantage):
    """(loss, d loss / d logp) of each token: max(-A r, -A clip(r, 0.8, 1.2))."""
    losses = [max(-advantage * r, -advantage * min(max(r, 0.8), 1.2)) for r in RATIOS]
    active = [r <= 1.2 if advantage > 0 else r >= 0.8 for r in RATIOS]
    return losses, [-advantage * r if on else 0.0 for r, on in zip(RATIOS, active, strict=True)]


def ctpo(advantage):
    """k_t = the sum of the log ratios up to t, clipped to [-0.025, 0.05] sqrt(t); A < 0: at most -A e^(0.05 sqrt t)."""
    losses, slopes, k = [], [], 0.0
    for t, ratio in enumerate(RATIOS, start=1):
        k += math.log(ratio)
        low, high = -0.025 * t**0.5, 0.05 * t**0.5
        loss = max(-advantage * math.exp(k), -advantage * math.exp(min(max(k, low), high)))
        active = k <= high if advantage > 0 else low <= k <= high
        losses.append(loss if advantage > 0 else min(loss, -advantage * math.exp(high)))
        slopes.append(-advantage * math.exp(k) if active else 0.0)
    return losses, slopes


@COMPILED
@pytest.mark.parametrize("advantage", [1.25, -0.75])
@pytest.mark.parametrize("name,formula", [("grpo", grpo), ("ctpo", ctpo)])
def test_the_paper_on_a_few_tokens(name, formula, advantage, backend):
    """d logp / d h = W[id] - sum_v p_v W[v], and the loss is the mean over the tokens."""
    device, losses_slopes = device_of(backend), formula(advantage)
    probs = [softmax(h) for h in HIDDEN]
    old_logp = [math.log(p[i]) - math.log(r) for p, i, r in zip(probs, IDS, RATIOS, strict=True)]
    means = [[sum(p[v] * WEIGHT[v][d] for v in range(3)) for d in range(2)] for p in probs]
    losses, slopes = losses_slopes
    grad = [[slopes[t] / 4 * (WEIGHT[IDS[t]][d] - means[t][d]) for d in range(2)] for t in range(4)]
    hidden, weight, old, advantages = (
        torch.tensor(x, dtype=torch.float64, device=device) for x in ([HIDDEN], WEIGHT, [old_logp], [advantage])
    )
    ids = torch.tensor([IDS], device=device)
    loss, _ = tokenrl.linear_policy_loss(name, hidden.requires_grad_(), weight, ids, old, advantages, backend=backend)
    (found,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert 0 < sum(slope != 0 for slope in slopes) < 4
    torch.testing.assert_close(found.cpu()[0], torch.tensor(grad, dtype=torch.float64), rtol=1e-12, atol=1e-14)
