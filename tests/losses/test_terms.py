"""KL and entropy terms with weights of their own, and a KL times the ratio: against autograd's own derivative."""

import itertools
import math

import pytest
import torch
from cases import backends_to_test, batch, device_of, interpreted, packed, thinned

import tokenrl
from tokenrl.ops.linear.head import BYTES_PER_TILE

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
KLS = {
    "kl_k1": lambda s: s,
    "kl_k2": lambda s: s * s / 2,
    "kl_k3": lambda s: torch.exp(-s) - 1 + s,
    "kl_abs": lambda s: s.abs(),
}


def given(backend, layout="padded"):
    """(logp and entropy as leaves, the rest) in fp64; ratios of up to e^2."""
    case = batch(2)
    g = torch.Generator().manual_seed(5)
    for name in ("ref_logp", "entropy", "kl_weight", "entropy_weight"):
        noise = 0.7 * torch.randn(case["logp"].shape, generator=g, dtype=torch.float64)
        case[name] = case["old_logp"] + noise if name == "ref_logp" else noise.abs()
    case = {name: x.to(device_of(backend)) for name, x in (packed(case) if layout == "packed" else case).items()}
    case.pop("segment_ids")
    leaves = [case.pop(name).requires_grad_() for name in ("logp", "entropy")]
    return *leaves, case


def corrected(logp, old, case, kl, level):
    """r_t k_t in torch, its gradient autograd's, 0 in masked cells."""
    mask = case["mask"]
    x = torch.where(mask, logp - old, 0)
    if level == "span_mean":
        boundaries = case.get("cu_seqlens")
        if boundaries is None:
            x = (x.sum(1, True) / mask.sum(1, True).clamp(min=1)).expand_as(x)
        else:
            spans = list(zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True))
            means = [x[a:b].sum() / mask[a:b].sum().clamp(min=1) for a, b in spans]
            x = torch.cat([mean.expand(b - a) for mean, (a, b) in zip(means, spans, strict=True)])
    return torch.where(mask, x.exp() * KLS[kl](torch.where(mask, logp - case["ref_logp"], 0)), 0)


CORRECTED = list(itertools.product(["old", "on-policy"], ["token", "span_mean"], KLS, ["padded", "packed"]))


@pytest.mark.parametrize(
    "old,level,kl,layout,backend", [(*c, b) for b in backends_to_test() for c in thinned(CORRECTED, b)]
)
def test_a_kl_times_the_ratio_has_the_derivative_of_both(old, level, kl, layout, backend):
    logp, _, case = given(backend, layout)
    old_logp = case["old_logp"] if old == "old" else None
    where = {name: case[name] for name in ("mask", "cu_seqlens") if name in case}
    weight = torch.where(case["mask"], case["kl_weight"], 0)
    base, _ = tokenrl.policy_loss("ppo", logp, old_logp, case["advantages"], backend=backend, **where)
    term = weight * corrected(logp, logp.detach() if old_logp is None else old_logp, case, kl, level)
    expected = base + 0.3 * term.sum()
    found, metrics = tokenrl.policy_loss(
        "ppo", logp, old_logp, case["advantages"], ref_logp=case["ref_logp"], kl=kl, kl_coef=0.3, kl_ratio=level,
        kl_weight=case["kl_weight"], backend=backend, **where,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert metrics.kl == pytest.approx(term.sum().item(), rel=1e-12)
    got, truth = (torch.autograd.grad(loss, logp)[0] for loss in (found, expected))
    assert truth.any()
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


@EVERY_BACKEND
@pytest.mark.parametrize("objective", ["ctpo", "gmpo"])
def test_terms_of_their_own_weights_do_not_see_the_aggregation(objective, backend):
    """Nor the normalizer, nor token_weight."""
    logp, entropy, case = given(backend)
    rest = {name: case[name] for name in ("mask", "token_weight")} | {"normalizer": 7, "backend": backend}
    order = (logp, case["old_logp"], case["advantages"])
    base, _ = tokenrl.policy_loss(objective, *order, **rest)
    kl = torch.where(case["mask"], logp - case["ref_logp"], 0)
    terms = [torch.where(case["mask"], case[f"{name}_weight"] * x, 0) for name, x in (("kl", kl), ("entropy", entropy))]
    expected = base + 0.3 * terms[0].sum() - 0.1 * terms[1].sum()
    found, metrics = tokenrl.policy_loss(
        objective, *order, ref_logp=case["ref_logp"], kl="kl_k1", kl_coef=0.3, kl_weight=case["kl_weight"],
        entropy=entropy, entropy_coef=0.1, entropy_weight=case["entropy_weight"], **rest,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (metrics.kl, metrics.entropy) == pytest.approx([term.sum().item() for term in terms], rel=1e-12)
    for got, truth in zip(*(torch.autograd.grad(x, (logp, entropy)) for x in (found, expected)), strict=True):
        assert truth.any()
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


def head_case():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 70, 8, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 8, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 11, (3, 70), generator=g)
    mask = torch.rand(3, 70, generator=g) > 0.2
    old, ref, own, bonus = (torch.randn(3, 70, generator=g, dtype=torch.float64) for _ in range(4))
    more = {"ref_logp": ref / 4 - 2.4, "kl_coef": 0.3, "entropy_coef": 0.1, "mask": mask}
    more |= {"kl_weight": own.abs(), "entropy_weight": bonus.abs()}
    return (hidden, weight, ids, old / 4 - 2.4, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)), more


LEVELS, OBJECTIVES, ROWS = (None, "token", "span_mean"), ("ppo", "gspo", "ctpo"), (math.inf, 80)
ONE_PASS = [
    (*case, backend)
    for backend in backends_to_test()
    for case in thinned([*itertools.product(ROWS, (False, True), OBJECTIVES, LEVELS)], "sim")
    # The interpreter takes a quarter of a minute for each: of it the one of most parts.
    if not interpreted(backend) or case == (80, False, "gspo", "span_mean")
]


@pytest.mark.parametrize("rows,on_policy,objective,level,backend", ONE_PASS)  # 80 hold each sequence's valid tokens
def test_from_hidden_states_in_one_pass(rows, on_policy, objective, level, backend):
    (hidden, weight, ids, old, advantages), more = head_case()
    given = [x.detach().to(device_of(backend)).requires_grad_() for x in (hidden, weight)]
    ids, old, advantages = (x.to(device_of(backend)) for x in (ids, old, advantages))
    more = {name: x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    old = None if on_policy else old
    stats = tokenrl.linear_token_logprobs(*given, ids, backend=backend)
    expected, apart = tokenrl.policy_loss(
        objective, stats.logp, old, advantages, entropy=stats.entropy, kl_ratio=level, backend=backend, **more
    )
    budget = None if rows == math.inf else rows * ((11 + 8) * 8 + BYTES_PER_TILE)
    found, metrics = tokenrl.linear_policy_loss(
        objective, *given, ids, old, advantages, kl_ratio=level, memory_budget=budget, backend=backend, **more
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    assert (metrics.kl, metrics.entropy) == pytest.approx((apart.kl, apart.entropy), rel=1e-11)
    for got, truth in zip(*(torch.autograd.grad(x, given) for x in (found, expected)), strict=True):
        assert truth.any()
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
    assert metrics.passes == 1


@EVERY_BACKEND
def test_one_number_per_sequence_broadcasts(backend):
    logp, _, case = given(backend)
    column = case["token_weight"][:, :1]
    found, truth = (
        tokenrl.policy_loss(
            "ppo", logp, case["old_logp"], advantages, token_weight=weight, kl_weight=weight, mask=case["mask"],
            ref_logp=case["ref_logp"], kl_coef=0.1, backend=backend,
        )[0]
        for weight, advantages in (
            (column, case["advantages"].reshape(len(column), -1)[:, :1]),
            (column.expand_as(logp), case["advantages"].reshape(len(column), -1)[:, :1].expand_as(logp)),
        )
    )  # fmt: skip
    assert found == truth
    assert torch.equal(*(torch.autograd.grad(loss, logp)[0] for loss in (found, truth)))


X = torch.zeros(2, 3)
BATCH = {"logp": X, "old_logp": X, "ref_logp": X, "advantages": torch.ones(2)}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"kl_ratio": "sequence"}, "kl_ratio: got 'sequence', accepted: token, span_mean"),
        ({"kl_weight": torch.zeros(2, 2)}, r"kl_weight: got shape \[2, 2\], accepted: one value per token, \[2, 3\]"),
        ({"kl_weight": torch.zeros(2, 3, requires_grad=True)}, "kl_weight: got a tensor that requires grad"),
        ({"entropy_weight": [1.0]}, r"entropy_weight: got .*, accepted: a torch.Tensor"),
        ({"token_weight": torch.zeros(1, 3)}, r"token_weight: got shape \[1, 3\], accepted: one value per token"),
        (
            {"objective": "vespo", "rollout_logp": X, "kl_ratio": "token"},
            "kl_ratio: got 'token' and rollout_logp, which 'vespo' takes into its ratio, accepted: one of the two",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.policy_loss(**{"objective": "ppo"} | arguments, **BATCH)
