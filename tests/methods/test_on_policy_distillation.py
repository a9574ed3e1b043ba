"""What sampled tokens learn from a teacher: formulas in loops, ms-swift's and verl's own functions, errors."""

from types import SimpleNamespace

import pytest
import torch
import verl_source
from host_source import HOSTS, lifted

import tokenrl
from tokenrl.methods import on_policy_distillation as opd

LOSSES = [opd.teacher_advantages, opd.iw_opd_advantages, opd.minillm_advantages]


def batch(rows=4, width=7, seed=0):
    """logp, teacher_logp with garbage in masked cells, advantages [B], mask with holes, a row of one, an empty row."""
    g = torch.Generator().manual_seed(seed)
    logp, teacher = -torch.rand(2, rows, width, generator=g, dtype=torch.float64) * 3
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[1], mask[2] = False, torch.arange(width) == 3
    logp[~mask], teacher[~mask] = torch.nan, torch.inf
    return logp, teacher, torch.randn(rows, generator=g, dtype=torch.float64), mask


def by_hand(logp, teacher, mask, gamma, holes):
    """sum_{i >= t} gamma^(i - t) r_i and sum_{i >= t} gamma^(i - t), token by token."""
    found, lengths = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for j, t in mask.nonzero().tolist():
        behind = [i for i in range(t, mask.shape[1]) if mask[j, i]]
        for n, i in enumerate(behind):
            power = gamma ** (n if holes == "skip" else i - t)
            found[j, t] += power * (teacher[j, i] - logp[j, i])
            lengths[j, t] += power
    return found, lengths


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("holes", ["skip", "count"])
def test_rewards_to_go(gamma, holes):
    logp, teacher, advantages, mask = batch()
    expected, lengths = by_hand(logp, teacher, mask, gamma, holes)
    how = {"gamma": gamma, "mask": mask, "advantages": advantages}
    base = torch.where(mask, advantages[:, None], 0)
    found = opd.teacher_advantages(logp, teacher, coef=0.5, holes=holes, **how)
    torch.testing.assert_close(found, base + 0.5 * expected)
    if holes == "skip":
        ours = opd.minillm_advantages(logp, teacher, **how)
        torch.testing.assert_close(ours, base + torch.where(mask, expected / lengths, 0))
        ours = opd.minillm_advantages(logp, teacher, normalize_length=False, **how)
        torch.testing.assert_close(ours, base + expected)


def test_iw_opd_in_a_loop():
    logp, teacher, _, mask = batch()
    expected = torch.zeros_like(logp)
    for j, row in enumerate(mask):
        at = row.nonzero().flatten().tolist()
        a = [(teacher[j, t] - logp[j, t]).item() for t in at]
        for n, t in enumerate(at):
            share = sum(map(abs, a[:n])) / sum(map(abs, a))
            expected[j, t] = (1 + 0.8 * (1 - share)) * a[n]
    torch.testing.assert_close(opd.iw_opd_advantages(logp, teacher, gamma=0.8, mask=mask), expected)


@pytest.mark.parametrize("advantages", LOSSES)
def test_packed_is_padded(advantages):
    logp, teacher, _, mask = batch()
    cu_seqlens = torch.arange(0, mask.numel() + 1, mask.shape[1])
    flat = advantages(logp.flatten(), teacher.flatten(), mask=mask.flatten(), cu_seqlens=cu_seqlens)
    assert torch.equal(flat.view(mask.shape), advantages(logp, teacher, mask=mask))
    half = advantages(logp.float(), teacher.float(), mask=mask)
    assert half.dtype == torch.float32 and half.any() and not half[~mask].any()


def test_the_expected_gradient_is_that_of_the_reverse_kl():
    """Over all tokens that may be sampled, each as often as the student samples it."""
    logits, teacher = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    logp, teacher_logp = logits.log_softmax(-1).expand(6, 6).diagonal()[None], teacher.log_softmax(-1)
    advantages = opd.teacher_advantages(logp.detach(), teacher_logp)
    loss, _ = tokenrl.policy_loss("ratio", logp, None, advantages, token_weight=logp.detach().exp(), normalizer=1.0)
    kl, _ = tokenrl.distillation_loss("reverse_kd", logits[None], teacher[None])
    found, expected = (torch.autograd.grad(value, logits)[0] for value in (loss, kl))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected)


def test_ref_kl_of_prime_rl():
    """-keep sg(ref - logp) ratio + 0.001 s^2 of each token, as its loss function has it."""
    old, ref, _, mask = batch(seed=3)
    old = torch.where(mask, old, -1.0)
    logp = (old + torch.randn(mask.shape, generator=torch.Generator().manual_seed(4)) * 0.7).clamp(max=-1e-3)
    logp.requires_grad_()
    s = logp - old
    keep = logp.exp() - old.exp() >= -0.2
    assert (keep & mask).any() and (~keep & mask).any()
    terms = keep * (logp - torch.where(mask, ref, 0)).detach() * s.exp() + 1e-3 * s**2
    expected = (torch.where(mask, terms, 0)).sum() / mask.sum()
    now = logp.detach()
    found, _ = tokenrl.policy_loss(
        "ratio", logp, old, opd.teacher_advantages(now, ref, mask=mask), mask=mask, ref_logp=old, kl="kl_k2",
        token_weight=opd.kept_probability(now, old, mask=mask), kl_coef=2e-3,
        kl_weight=tokenrl.aggregation_weights("token-mean", mask=mask),
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(value, logp)[0] for value in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def test_ms_swift():
    path = HOSTS / "swift/rl_core/advantage.py"
    if not path.exists():
        pytest.skip("ms-swift is not in build/hosts (make build/hosts/.done)")
    names = ("compute_teacher_logratio", "expand_advantage_to_per_token")
    theirs = lifted(path, *names).expand_advantage_to_per_token
    logp, teacher, advantages, mask = batch()
    expected = theirs(advantages, mask, teacher, logp, teacher_kl_coef=0.3)
    found = opd.teacher_advantages(logp, teacher, mask=mask, advantages=advantages, coef=0.3)
    torch.testing.assert_close(found[mask], expected[mask])


@pytest.mark.skipif(verl_source.folder() is None, reason="verl is not installed")
def test_verls_policy_gradient():
    """verl's own distillation_loss with k1, loss and gradient."""
    core = verl_source.core_algos()
    penalty = verl_source.lifted(
        "kl", "trainer/ppo/core_algos.py", verl_source.named("kl_penalty", "kl_penalty_forward")
    )
    metric = verl_source.lifted("verl.utils.metric", "utils/metric/utils.py", lambda node: True)
    types = {"TensorDict": dict, "no_padding_2_padding": lambda x, data: x, "kl_penalty": penalty.kl_penalty}
    types |= {name: object for name in ("ActorConfig", "DistillationConfig", "DistillationLossConfig")}
    own = ("distillation_loss", "compute_distillation_loss_range", "compute_distillation_loss_reverse_kl_estimator")
    wanted = verl_source.named(*own)
    known = types | {"Metric": metric.Metric, "AggregationType": metric.AggregationType, "agg_loss": core.agg_loss}
    known |= {"get_policy_loss_fn": core.get_policy_loss_fn, "get_distillation_loss_fn": lambda name: None}
    known |= {"register_distillation_loss": lambda settings: lambda made: made, "DistillationLossSettings": dict}
    theirs = verl_source.lifted("losses", "trainer/distillation/losses.py", wanted, **known)
    theirs.get_distillation_loss_fn = lambda name: theirs.compute_distillation_loss_reverse_kl_estimator

    old, teacher, _, mask = batch(seed=5)
    old, teacher = torch.where(mask, old, 0), torch.where(mask, 8 * teacher, 0)
    logp = (old + 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(6))).requires_grad_()
    config = verl_source.actor_config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2)
    of_loss = SimpleNamespace(
        loss_mode="k1", loss_max_clamp=10.0, use_policy_gradient=True, policy_loss_mode="vanilla", global_batch_info={},
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, get=lambda name, default: default,
    )  # fmt: skip
    data = {"teacher_logprobs": teacher[..., None], "response_mask": mask, "old_log_probs": old}
    data |= {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
    expected, _ = theirs.distillation_loss(
        config, SimpleNamespace(distillation_loss=of_loss), {"log_probs": logp}, data
    )
    advantages = opd.teacher_advantages(logp.detach(), teacher, mask=mask, limit=10.0)
    assert (advantages == -10).any()
    found, _ = tokenrl.policy_loss(tokenrl.objective("ppo", dual=3.0), logp, old, advantages, mask=mask)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(value, logp)[0] for value in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


LOGP = -torch.rand(2, 3)
ERRORS = {
    "gradient": ({"logp": LOGP.clone().requires_grad_()}, r"logp: got a tensor that requires grad, .*logp.detach\(\)"),
    "shape": ({"teacher_logp": LOGP[1:]}, r"teacher_logp: got shape \[1, 3\], accepted: one value per token"),
    "half": ({"logp": LOGP.half()}, "logp: got dtype torch.float16"),
    "unscored": (
        {"teacher_logp": LOGP.log()},
        "teacher_logp: got NaN in 6 places, accepted: a log-prob of every token",
    ),
    "unscored by trl": (
        {"teacher_logp": LOGP.log(), "compat": "trl", "of": opd.minillm_advantages},
        "teacher_logp: got NaN in 6 places",
    ),
    "gamma": ({"gamma": 1.5}, r"gamma: got 1.5, accepted: a number in \[0, 1\]"),
    "holes": ({"holes": "skipp"}, "holes: got 'skipp', accepted: skip, count. Did you mean 'skip'"),
    "per": ({"advantages_per": "token"}, "advantages_per: got 'token', accepted: None where there are no advantages"),
    "limit": ({"limit": 0}, "limit: got 0, accepted: a number above 0"),
    "compat": ({"compat": "verl", "of": opd.minillm_advantages}, "compat: got 'verl', accepted: trl"),
    "eps": ({"eps": 0, "of": opd.iw_opd_advantages}, "eps: got 0, accepted: a number above 0"),
    "fall": ({"fall": -1, "of": opd.kept_probability}, "fall: got -1, accepted: a number above 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, message = ERRORS[name]
    given = {"logp": LOGP, "teacher_logp": LOGP} | given
    of = given.pop("of", opd.teacher_advantages)
    if of is opd.kept_probability:
        given["old_logp"] = given.pop("teacher_logp")
    with pytest.raises(ValueError, match=f"^{message}"):
        of(**given)
