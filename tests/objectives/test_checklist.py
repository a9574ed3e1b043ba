"""The mistakes that implementations of these objectives make, one test each."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, on_backends, repeats

import tokenrl
from tokenrl import advantages as adv
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.objectives.gates.bounded import PpoClip

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
NAN = math.nan


def gradient(objective, x, a, backend, *, mask=None, logp=None, **more):
    """d loss / d logp where the log ratios are x [B, T] (or a row of them) and the advantages a."""
    x = torch.atleast_2d(torch.tensor(x, dtype=torch.float64))
    a = torch.atleast_1d(torch.tensor(a, dtype=torch.float64))
    logp = torch.full_like(x, -1.0) if logp is None else torch.atleast_2d(torch.tensor(logp, dtype=torch.float64))
    given = {"mask": None if mask is None else torch.atleast_2d(torch.tensor(mask, dtype=torch.bool))} | more
    given = {name: v.to(device_of(backend)) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    leaf = logp.to(device_of(backend)).requires_grad_()
    old = (logp - x).detach().to(leaf.device)
    loss, _ = tokenrl.policy_loss(objective, leaf, old, a.to(leaf.device), backend=backend, **given)
    return torch.autograd.grad(loss, leaf)[0].cpu()


@EVERY_BACKEND
def test_01_the_direction_of_min_and_max(backend):
    for a, stopped, moving in ((1.0, 0.5, -0.5), (-1.0, -0.5, 0.5)):
        assert gradient("ppo", [stopped], a, backend).item() == 0
        assert gradient("ppo", [moving], a, backend).item() == pytest.approx(-a * math.exp(moving))


@EVERY_BACKEND
def test_02_ctpo_counts_its_own_token_and_minpro_does_not(backend):
    x = [0.01, -0.02, 0.015]
    ctpo = gradient("ctpo", x, 1.0, backend)
    assert ctpo.tolist()[0] == pytest.approx([-math.exp(sum(x[: t + 1])) / 3 for t in range(3)])
    minpro = gradient("minpro", x, 1.0, backend)
    before = [0.0, x[0], min(x[:2])]
    assert minpro.tolist()[0] == pytest.approx([-math.exp(m + y) / 3 for m, y in zip(before, x, strict=True)])
    # CPPO: the budget of a token is what the tokens before it left.
    row = tokenrl.objective("cppo", delta=1.0, delta_b=0.0, quantile=None, w_min=1.0)
    far = torch.tensor([[0.9, 0.2, 0.05]], dtype=torch.float64).to(device_of(backend))
    kept = gradient(tokenrl.objective(row, divergence=far), [0.1, 0.1, 0.1], 1.0, backend) != 0
    assert kept.tolist() == [[True, False, False]]  # 0.9 <= 1; 0.2 > 1 - 0.9; 0.05 > 1 - 1.1


@EVERY_BACKEND
def test_03_which_clips_are_in_log_space(backend):
    # 0.5 above in log space is 0.65 above in ratio space: bounds of 0.6 tell the two apart.
    for name, x in (("ctpo", 0.5), ("ppo", 0.45)):
        bounds = {"eps_high": 0.6, "eps_low": 0.6} | ({"power": 0.0} if name == "ctpo" else {})
        assert gradient(tokenrl.objective(name, **bounds), [x], 1.0, backend).item() != 0
    assert gradient(tokenrl.objective("ppo", eps_high=0.6), [0.5], 1.0, backend).item() == 0
    gmpo = tokenrl.objective("gmpo", eps_high=0.6)
    assert gradient(gmpo, [0.5], 1.0, backend).item() != 0 and gradient(gmpo, [0.61], 1.0, backend).item() == 0
    assert tokenrl.OBJECTIVES["gmpo"].form.eps_high == 0.4 and tokenrl.OBJECTIVES["gspo"].gate.eps_high == 4e-4


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["ctpo", "ctpo_geomean", "minpro", "minpro_capped", "minpro_clip", "cppo"])
def test_04_tool_tokens_inside_a_prefix(name, backend):
    x, tool = [0.02, -0.01, 0.015, -0.02], [5.0, NAN, -7.0]
    plain = gradient(name, x, -1.0, backend)
    held = gradient(name, [*x[:2], *tool, *x[2:]], -1.0, backend, mask=[1, 1, 0, 0, 0, 1, 1])
    assert held[0, 2:5].tolist() == [0, 0, 0]
    torch.testing.assert_close(held[:, [0, 1, 5, 6]], plain, rtol=1e-12, atol=0)
    again = gradient(name, [-0.3, *x[1:2], *tool, *x[2:]], -1.0, backend, mask=[1, 1, 0, 0, 0, 1, 1])
    if name != "cppo":  # whose budget is not spent here
        assert not torch.equal(again[:, 5:], held[:, 5:])  # the earlier turn is seen across the hole


@EVERY_BACKEND
@pytest.mark.parametrize("power", [0.5, -0.5])
def test_05_positions_count_valid_tokens_from_one(power, backend):
    row = tokenrl.objective("ctpo", statistic="token", flow="through", eps_high=0.1, power=power)
    for t in range(1, 4):
        edge = 0.1 * t**power
        for x, active in ((edge - 1e-6, True), (edge + 1e-6, False)):
            mask = [0] + [1] * t
            slope = gradient(row, [9.0, *[0.0] * (t - 1), x], 1.0, backend, mask=mask)[0, -1]
            assert (slope != 0) == active, (t, x)


@on_backends([n for n in tokenrl.OBJECTIVES if tokenrl.OBJECTIVES[n].gate.uses_advantages])
def test_06_padding_may_hold_anything(name, backend):
    how = {"group_ids": torch.zeros(2, dtype=torch.int64)}
    mask = [[1, 1, 0], [1, 0, 0]]
    clean = [[0.02, -0.3, 0.0], [0.25, 0.0, 0.0]]
    dirty = [[0.02, -0.3, math.inf], [0.25, NAN, -math.inf]]
    results = []
    for x in (clean, dirty):
        torch.manual_seed(0)
        results.append(gradient(name, x, [1.0, -1.0], backend, mask=mask, **how))
    assert results[0].isfinite().all()
    repeats(*results, name, backend)


@EVERY_BACKEND
def test_07_nothing_to_divide_by(backend):
    logp = torch.zeros(2, 3, device=device_of(backend), requires_grad=True)
    for mode in AGGREGATIONS:
        loss, _ = tokenrl.policy_loss(
            "ppo", logp, None, torch.ones(2, device=logp.device), mask=torch.zeros_like(logp, dtype=torch.bool),
            group_ids=torch.zeros(2, dtype=torch.int64, device=logp.device), aggregation=mode, backend=backend,
        )  # fmt: skip
        assert loss.item() == 0 and torch.autograd.grad(loss, logp)[0].count_nonzero() == 0
    # A fully masked row is no row of the mean.
    one = gradient("grpo", [[0.0, 0.0], [NAN, NAN]], [1.0, 1.0], backend, mask=[[1, 1], [0, 0]])
    assert one.tolist() == [[-0.5, -0.5], [0, 0]]


@EVERY_BACKEND
def test_08_a_clamped_log_ratio_has_no_gradient(backend):
    row = tokenrl.objective("ppo", gate=PpoClip(1.0, math.inf))
    assert gradient(row, [20.5], 1.0, backend).item() == 0
    assert gradient(tokenrl.objective(row, clamp=21.0), [20.5], 1.0, backend).item() == pytest.approx(-math.exp(20.5))


@EVERY_BACKEND
def test_09_where_gradients_are_stopped(backend):
    x, weights = [0.001, -0.002], torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # only the first token pays
    reaches = {}
    for name in ("gspo", "gspo_token", "sspo", "ctpo", "minpro", "cispo", "vespo", "topr", "gmpo", "hmpo", "fiberpo"):
        wide = {"gate": PpoClip(0.9, 0.9)} if name in ("gspo", "gspo_token", "sspo") else {}
        wide |= {"eps": 1e-4} if name == "fiberpo" else {}  # unclipped it is the token's own ratio
        reaches[name] = gradient(tokenrl.objective(name, **wide), x, -1.0, backend, token_weight=weights)[0, 1] != 0
    through = {name for name, found in reaches.items() if found}
    assert through == {"gspo", "gmpo", "hmpo", "fiberpo"}


def test_10_what_a_standard_deviation_is():
    rewards, groups = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64), torch.tensor([0, 0, 1])
    unbiased = adv.grpo(rewards, groups)
    assert unbiased[:2].tolist() == pytest.approx([-1 / (math.sqrt(2) + 1e-6), 1 / (math.sqrt(2) + 1e-6)])
    assert adv.grpo(rewards, groups, unbiased=False)[0].item() == pytest.approx(-1 / (1 + 1e-6))
    assert unbiased[2].item() == pytest.approx(7 / (1 + 1e-6))  # n - 1 = 0
    assert adv.grpo(rewards, groups, singleton="zero")[2].item() == 0


@on_backends([n for n, r in tokenrl.OBJECTIVES.items() if r.gate.uses_advantages and r.gate.vanishes], start=2)
def test_11_no_advantage_no_gradient(name, backend):
    how = {"group_ids": torch.zeros(2, dtype=torch.int64)}
    if name in ("kl_cov", "real"):
        pytest.skip(
            f"{name}: its penalty holds tokens of any advantage" if name == "kl_cov" else "REAL: A = 0 is a label"
        )
    found = gradient(name, [[0.3, -0.4], [0.5, 0.1]], [0.0, 0.0], backend, **how)
    assert found.count_nonzero() == 0
    # Balanced aggregation counts such rows in the group's size.
    alone = gradient("ba", [[0.1, 0.1], [0.1, 0.1]], [0.0, 1.0], backend, **how)
    assert alone.tolist()[1] == pytest.approx([-math.exp(0.1) / 4] * 2) and alone[0].count_nonzero() == 0


@EVERY_BACKEND
@pytest.mark.parametrize("mode", ["token-mean", "balanced", "group-mean"])
def test_12_micro_batches(mode, backend):
    """With the global count, parts that keep groups whole add up to the batch."""
    x, a = [[0.1, -0.1, 0.2], [0.3, 0.0, 0.1], [0.0, 0.2, 0.1], [0.1, 0.1, -0.3]], [1.0, -1.0, 0.5, -0.5]
    mask = [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]
    groups = torch.tensor([0, 0, 1, 1])
    whole = gradient("ppo", x, a, backend, mask=mask, group_ids=groups, aggregation=mode)
    count = {"token-mean": 9.0, "balanced": 2.0, "group-mean": 2.0}[mode]
    parts = [
        gradient("ppo", x[at], a[at], backend, mask=mask[at], group_ids=groups[at], aggregation=mode, normalizer=count)
        for at in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-14, atol=0)


@EVERY_BACKEND
@pytest.mark.parametrize("mode", ["balanced", "group-mean", "seq-mean-token-mean"])
def test_12_groups_that_micro_batches_split(mode, backend):
    """The weights of the whole batch, handed to its parts."""
    x, a = [[0.1, -0.1, 0.2], [0.3, 0.0, 0.1], [0.0, 0.2, 0.1], [0.1, 0.1, -0.3]], [1.0, -1.0, 0.5, -0.5]
    mask, groups = [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], torch.tensor([0, 1, 1, 0])
    whole = gradient("ppo", x, a, backend, mask=mask, group_ids=groups, aggregation=mode)
    w = tokenrl.aggregation_weights(
        mode,
        mask=torch.tensor(mask, dtype=torch.bool),
        advantages=torch.tensor(a, dtype=torch.float64),
        group_ids=groups,
    )
    parts = [
        gradient("ppo", x[at], a[at], backend, mask=mask[at], token_weight=w[at].double(), aggregation="token-sum")
        for at in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=0)


@EVERY_BACKEND
def test_13_the_dual_clip_of_ctpo_grows_with_the_position(backend):
    row = tokenrl.objective(
        "ctpo", eps_high=9.0, eps_low=9.0, eps_dual=0.1, power=1.0, statistic="token", flow="through"
    )
    slopes = gradient(row, [0.15, 0.15, 0.25, 0.45], -1.0, backend)
    assert (slopes != 0).tolist() == [[False, True, True, False]]  # thresholds 0.1, 0.2, 0.3, 0.4
    ppo = gradient(tokenrl.objective("ppo", eps_high=9.0, dual=math.exp(0.2)), [0.15, 0.15, 0.25, 0.15], -1.0, backend)
    assert (ppo != 0).tolist() == [[True, True, False, True]]


@EVERY_BACKEND
def test_14_rejected_tokens_in_the_count_or_out(backend):
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    weighed = gradient("ppo", [0.0] * 4, 1.0, backend, token_weight=kept)
    masked = gradient("ppo", [0.0] * 4, 1.0, backend, mask=[1, 0, 1, 0])
    assert weighed.tolist() == [[-0.25, 0, -0.25, 0]] and masked.tolist() == [[-0.5, 0, -0.5, 0]]


@EVERY_BACKEND
def test_15_log_probs_are_those_of_the_sampling_temperature(backend):
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(2, 3, 7, generator=g).to(device_of(backend)), torch.randint(0, 7, (2, 3), generator=g)
    ids = ids.to(logits.device)
    found = tokenrl.token_logprobs(logits, ids, temperature=0.7, backend=backend).logp
    expected = torch.log_softmax(logits / 0.7, -1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found, expected)
    assert (found - torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]).abs().min() > 1e-3


@EVERY_BACKEND
def test_16_nothing_is_shifted(backend):
    logits = torch.full((1, 3, 4), -20.0, device=device_of(backend))
    ids = torch.tensor([[2, 0, 3]], device=logits.device)
    logits.scatter_(2, ids[..., None], 20.0)  # logits[t] predict ids[t]
    assert tokenrl.token_logprobs(logits, ids, backend=backend).logp.abs().max() < 1e-6


@EVERY_BACKEND
def test_17_differences_of_log_probs_are_fp32(backend):
    """bf16 logits, fp32 log-probs: the ratio's noise stays far below GSPO's eps; log-probs in bf16 are refused."""
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(4, 8, 500, generator=g)).bfloat16().to(device_of(backend))
    ids = torch.randint(0, 500, (4, 8), generator=g).to(logits.device)
    found = tokenrl.token_logprobs(logits, ids, backend=backend).logp
    truth = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    assert found.dtype == torch.float32 and (found - truth).abs().max() < 4e-4 / 50
    with pytest.raises(ValueError, match="^logp: got dtype torch.bfloat16"):
        tokenrl.policy_loss("gspo", found.bfloat16(), None, torch.ones(4, device=logits.device), backend=backend)


@EVERY_BACKEND
@pytest.mark.parametrize(
    "name", ["ctpo", "minpro", "minpro_capped", "gspo", "vespo", "gmpo", "fiberpo", "cppo", "fipo"]
)
def test_18_scans_start_anew_at_every_sequence(name, backend):
    rows = [[0.02, -0.01, 0.03], [-0.04, 0.01], [0.015]]
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    logp = torch.full_like(flat, -1.0).to(device_of(backend)).requires_grad_()
    boundaries = torch.tensor([0, 3, 5, 6], device=logp.device)
    loss, _ = tokenrl.policy_loss(
        name, logp, (logp.detach().cpu() - flat).to(logp.device), torch.tensor([1.0, -1.0, 1.0]).to(logp.device),
        cu_seqlens=boundaries, aggregation="token-sum", backend=backend,
    )  # fmt: skip
    packed = torch.autograd.grad(loss, logp)[0].cpu()
    alone = [
        gradient(name, x, a, backend, aggregation="token-sum")[0] for x, a in zip(rows, (1.0, -1.0, 1.0), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-12, atol=0)


def test_19_names_that_mean_several_things_are_told_apart():
    """Where one acronym has several papers, the row's source says which."""
    papers = {
        "sspo": "2511.04256", "hapo": "2509.16591", "cppo": "2606.10968", "minpro": "2601.22718",
        "dppo_tv": "2602.04879",
    }  # fmt: skip
    for name, paper in papers.items():
        assert paper in tokenrl.OBJECTIVES[name].source
    raw, relative = (
        tokenrl.objective("cispo", eps_high=2.0, bound=bound).gate.params() for bound in ("raw", "relative")
    )
    assert raw == (0.0, 2.0) and relative == (0.0, 3.0)
