"""KL, entropy and rollout terms of policy_loss: the sums of what they are made of, on every backend."""

import pytest
import torch
from cases import backends_to_test, batch, device_of, packed

import tokenrl
from tokenrl import corrections

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


def given(backend, layout="padded"):
    """(logp and entropy as leaves, the rest) in fp64."""
    case = batch(2)
    g = torch.Generator().manual_seed(5)
    for name in ("ref_logp", "rollout_logp", "entropy"):
        noise = 0.3 * torch.randn(case["logp"].shape, generator=g, dtype=torch.float64)
        case[name] = noise.abs() if name == "entropy" else case["old_logp"] + noise
    case = {name: x.to(device_of(backend)) for name, x in (packed(case) if layout == "packed" else case).items()}
    leaves = [case.pop(name).requires_grad_() for name in ("logp", "entropy")]
    return *leaves, case


def parts(logp, entropy, case, backend, kl, **more):
    """The objective, the KL and the entropy as calls of their own."""
    ref, old, a = (case[name] for name in ("ref_logp", "old_logp", "advantages"))
    how = {name: case[name] for name in ("mask", "cu_seqlens", "token_weight") if name in case}
    how |= {"aggregation": "seq-mean-token-mean", "backend": backend}
    loss, _ = tokenrl.policy_loss("ctpo", logp, old, a, segment_ids=case["segment_ids"], **how)
    penalty, _ = tokenrl.policy_loss(tokenrl.objective(kl), logp, ref, None, **how)
    weight = how.pop("token_weight")
    weighted = torch.where(case["mask"], weight * entropy, 0)
    bonus = tokenrl.group_aggregate(weighted, how.pop("aggregation"), **how)
    return loss, penalty, bonus


@EVERY_BACKEND
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kl", ["kl_k3", "kl_abs"])
def test_the_terms_add_up(kl, layout, backend):
    logp, entropy, case = given(backend, layout)
    loss, penalty, bonus = parts(logp, entropy, case, backend, kl)
    expected = loss + 0.3 * penalty - 0.1 * bonus
    rest = {name: x for name, x in case.items() if name not in ("old_logp", "advantages", "rollout_logp")}
    found, metrics = tokenrl.policy_loss(
        "ctpo", logp, case["old_logp"], case["advantages"], entropy=entropy, kl=kl, kl_coef=0.3, entropy_coef=0.1,
        backend=backend, **rest,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert metrics.kl == pytest.approx(penalty.item(), rel=1e-12)
    assert metrics.entropy == pytest.approx(bonus.item(), rel=1e-12) and metrics.tokens == case["mask"].sum()
    for got, truth in zip(*(torch.autograd.grad(x, (logp, entropy)) for x in (found, expected)), strict=True):
        assert truth.any()
        torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


CORRECTIONS = [
    None,
    {"level": "sequence", "bound": "mask", "high": 3.0},
    {"level": "segment", "bound": "truncate", "high": 1.1},
]


@EVERY_BACKEND
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("on_policy", [False, True])
def test_rollout_log_probs_weigh_the_loss(on_policy, correction, layout, backend):
    logp, _, case = given(backend, layout)
    old = None if on_policy else case["old_logp"]
    trained = logp.detach() if on_policy else old
    where = {name: case[name] for name in ("mask", "cu_seqlens") if name in case}
    how = dict(correction or {"level": "token", "bound": "truncate", "high": 2.0})
    if how["level"] == "segment":
        how["segment_ids"] = case["segment_ids"]
    weights = corrections.importance_weights(trained, case["rollout_logp"], **where, **how)
    rest = where | {"segment_ids": case["segment_ids"], "backend": backend}
    weight = torch.where(case["mask"], weights * case["token_weight"], 0)
    expected, _ = tokenrl.policy_loss("ppo", logp, old, case["advantages"], token_weight=weight, **rest)
    found, _ = tokenrl.policy_loss(
        "ppo", logp, old, case["advantages"], token_weight=case["token_weight"], rollout_logp=case["rollout_logp"],
        correction=correction, **rest,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    got, truth = (torch.autograd.grad(x, logp)[0] for x in (found, expected))
    assert truth.any()
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=0)


def test_rollout_log_probs_from_hidden_states():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((2, 5, 8), (11, 8)))
    ids, a = torch.randint(0, 11, (2, 5), generator=g), torch.tensor([1.0, -1.0])
    logp = tokenrl.linear_token_logprobs(hidden, weight, ids).logp
    old, rollout = (logp.detach() + 0.2 * torch.randn(2, 5, generator=g) for _ in range(2))
    expected, _ = tokenrl.policy_loss("ppo", logp, old, a, rollout_logp=rollout, correction={"high": 1.1})
    found, _ = tokenrl.linear_policy_loss(
        "ppo", hidden, weight, ids, old, a, rollout_logp=rollout, correction={"high": 1.1}
    )
    torch.testing.assert_close(found, expected)
    for got, truth in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(got, truth)
    with pytest.raises(ValueError, match="^old_logp: got None, accepted: log-probs to compare rollout_logp with"):
        tokenrl.linear_policy_loss("ppo", hidden, weight, ids, None, a, rollout_logp=rollout)


X = torch.zeros(2, 3)
A = torch.ones(2)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"kl_coef": 0.1}, r"ref_logp: got None, accepted: one log-prob per token, \[2, 3\]; kl_coef is 0.1"),
        ({"entropy_coef": 0.1}, r"entropy: got None, accepted: one entropy per token, \[2, 3\]; entropy_coef is 0.1"),
        ({"entropy": X[:, :2], "entropy_coef": 1.0}, r"entropy: got shape \[2, 2\], accepted: one value per token"),
        ({"ref_logp": X, "kl": "ppo"}, "kl: got 'ppo', accepted: kl_abs, kl_k1"),
        ({"ref_logp": X, "kl": "kl_cov"}, "kl: got 'kl_cov', accepted: kl_abs"),
        ({"ref_logp": X.clone().requires_grad_()}, "ref_logp: got a tensor that requires grad"),
        ({"correction": {"level": "token"}}, "rollout_logp: got None, accepted: log-probs of the sampling engine"),
        ({"rollout_logp": X, "correction": {"level": "row"}}, "level: got 'row', accepted: token, sequence"),
        ({"rollout_logp": X[:1]}, "rollout_logp: got shape"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.policy_loss("ppo", X, X, A, **arguments)
