"""verl's real policy losses (tests/support/verl_source.py) beside tokenrl's in their place: loss, gradient, metrics."""

import itertools

import pytest
import torch
import verl_source

if verl_source.folder() is None:
    pytest.skip("verl is not installed (make test installs it, without its dependencies)", allow_module_level=True)

from verl_batches import batch, evaluated

from tokenrl.integrations import verl
from tokenrl.integrations.verl.batch import AGGREGATIONS, counts_rows
from tokenrl.integrations.verl.modes import MODES

SETTINGS = {  # of verl's config, so that much is clipped and selected
    "vanilla": {"clip_ratio_high": 0.28}, "gspo": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08},
    "sapo": {"tau_neg": 1.3}, "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_lb": 0.1, "clip_cov_ub": 50.0},
    "kl_cov": {"kl_cov_ratio": 0.2}, "dro": {"dro_beta": 0.07}, "cispo": {"clip_ratio_low": 0.1},
    "dppo_tv": {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03, "clip_ratio_c": 1.2},
    "dppo_kl": {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.2},
}  # fmt: skip
INFOS = {
    "local": {},
    "unset": dict.fromkeys(("batch_num_tokens", "global_batch_size", "loss_scale_factor"), None) | {"dp_size": 1},
    "global": {"dp_size": 4, "batch_num_tokens": 117, "global_batch_size": 21, "loss_scale_factor": None},
    "scaled": {"dp_size": 2, "batch_num_tokens": 117, "global_batch_size": 21, "loss_scale_factor": 512},
}
# fp64: what is left is verl's own. Its sigmoid's slope cancels at large ratios (sapo), and tokens beyond |x| = 20 weigh
# e^-20 there and e^x here (dppo). verl divides by N + 1e-8 and counts in fp32.
LIMITS = {"loss": 1e-12, "gradient": 1e-12, "metrics": 1e-7}
OF_MODES = {"sapo": {"gradient": 1e-8}, "dppo_tv": {"loss": 5e-7, "gradient": 2e-8},
            "dppo_kl": {"loss": 5e-7, "gradient": 2e-8}}  # fmt: skip


def differences(truth, found):
    """Relative: of the loss (to the size of its terms), of the gradient (to its largest), and of verl's metrics."""
    (loss, grad, metrics), (our_loss, our_grad, our_metrics) = truth, found
    size = grad.abs().max().item() or 1.0
    return {
        "loss": abs(our_loss - loss).item() / max(abs(loss).item(), grad.abs().sum().item(), 1e-300),
        "gradient": ((our_grad - grad).abs().max() / size).item(),
        "metrics": max((abs(our_metrics[key] - x) / max(1.0, abs(x)) for key, x in metrics.items()), default=0.0),
    }


def pair(core, name):
    """(verl's function, ours in its place)"""
    if name not in core.POLICY_LOSS_REGISTRY:
        pytest.skip(f"verl {verl_source.version()} has no loss mode {name!r}")
    theirs = core.POLICY_LOSS_REGISTRY[name]
    verl.replace(name)
    assert core.get_policy_loss_fn(name) is not theirs
    return theirs, core.get_policy_loss_fn(name)


def aggregations(core):
    return [mode for mode in AGGREGATIONS if mode != "token-sum" or '"token-sum"' in verl_source.text(core)]


def cases(core, infos):
    """All aggregation modes x global counts x rollout weights x (small ratios, sequence advantages | large, token)."""
    for seed, (mode, info, weighted, large) in enumerate(
        itertools.product(aggregations(core), infos, (False, True), (False, True))
    ):
        given = batch(seed, 12 if large else 0.3, per_token=large)
        weight = 2 * torch.rand(given[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        yield given, mode, INFOS[info], weight if weighted else None


@pytest.mark.parametrize("name", MODES)
def test_the_numbers_are_those_of_verl(name, core):
    theirs, ours = pair(core, name)
    options, worst = SETTINGS.get(name, {}), dict.fromkeys(LIMITS, 0.0)
    for case in cases(core, INFOS if verl_source.counts_globally(core) else ("local",)):
        truth, found = evaluated(theirs, *case, **options), evaluated(ours, *case, **options)
        assert set(found[2]) == set(truth[2]) | {"tokenrl/ess", "tokenrl/ratio_max"}
        worst = {key: max(worst[key], value) for key, value in differences(truth, found).items()}
    print(f"verl {verl_source.version()} {name}", {key: f"{value:.0e}" for key, value in worst.items()})
    limits = LIMITS | OF_MODES.get(name, {})
    assert all(worst[key] <= limits[key] for key in limits), worst


@pytest.mark.parametrize("name", MODES)
def test_in_fp32_ours_is_as_near_to_the_truth_as_verl_s(name, core):
    """The truth is verl's in fp64."""
    theirs, ours = pair(core, name)
    options = SETTINGS.get(name, {})
    for given, *rest, weight in cases(core, ("local",)):
        single = [x.float() if x.is_floating_point() else x for x in given]
        exact = [x.double() if x.is_floating_point() else x for x in single]
        few = None if weight is None else weight.float()
        truth = evaluated(theirs, exact, *rest, None if few is None else few.double(), **options)
        found, other = (evaluated(function, single, *rest, few, **options) for function in (ours, theirs))
        assert found[0].dtype == torch.float32
        near, allowed = differences(truth, found), differences(truth, other)
        assert all(near[key] <= 2 * allowed[key] + 1e-6 for key in near), (near, allowed)


def test_bf16_log_probs_are_computed_in_fp32(core):
    theirs, ours = pair(core, "vanilla")
    given = [x.bfloat16() if x.is_floating_point() else x for x in batch(0, 0.3, True)]
    as_fp32 = [x.float() if x.is_floating_point() else x for x in given]
    found, truth = evaluated(ours, given, "token-mean", {}, None), evaluated(ours, as_fp32, "token-mean", {}, None)
    assert found[0] == truth[0] and found[0].dtype == torch.float32
    assert torch.equal(found[1], truth[1].bfloat16()) and found[2] == truth[2]


def test_micro_batches_of_ranks_add_up(core):
    """The mean over ranks of the sum over micro-batches is the loss of the whole batch."""
    if not verl_source.counts_globally(core):
        pytest.skip(f"verl {verl_source.version()} has no global counts")
    verl.replace("vanilla")
    given, ours = batch(3, 0.3, False), core.get_policy_loss_fn("vanilla")
    mask = given[3]
    over_width = [] if counts_rows(core.agg_loss) else ["seq-mean-token-sum-norm"]  # 0.7.0's does not add up
    for mode in [mode for mode in aggregations(core) if mode not in over_width]:
        whole, grad, _ = evaluated(ours, given, mode, {}, None)
        info = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": int(mask.any(1).sum())}
        parts = [[x[i : i + 2] for x in given] for i in (0, 2, 4)]
        found = [evaluated(ours, part, mode, info, None) for part in parts]
        torch.testing.assert_close(sum(loss for loss, _, _ in found) / 2, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([g for _, g, _ in found]) / 2, grad, rtol=1e-12, atol=0)


def test_nothing_valid_reports_zeros(core):
    given = batch(0, 0.3, False)
    given = *given[:3], torch.zeros_like(given[3])
    loss, grad, metrics = evaluated(core.get_policy_loss_fn("tokenrl_ctpo"), given, "token-mean", {}, None)
    assert loss == 0 and not grad.any() and set(metrics.values()) == {0.0}


def test_ppo_is_vanilla(core):
    theirs = core.POLICY_LOSS_REGISTRY["vanilla"]
    case = batch(1, 2.0, True), "token-mean", INFOS["global"], None
    options = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 2.0}
    for name in ("ppo", "grpo", "dapo", "bnpo", "dr_grpo"):
        found = evaluated(core.get_policy_loss_fn(f"tokenrl_{name}"), *case, **options)
        assert max(differences(evaluated(theirs, *case, **options), found).values()) < 1e-7


class Data(dict):
    """A stand-in for a TensorDict, which is not installed: a padded batch."""

    def select(self, *names):
        return Data({name: self[name] for name in names})

    def to_padded_tensor(self):
        return self


@pytest.mark.parametrize("name", MODES)
def test_verl_s_caller(name, core):
    """ppo_loss, which adds an entropy bonus to our loss in place and collects the metrics."""
    if not verl_source.has_caller():
        pytest.skip(f"verl {verl_source.version()} has no ppo_loss of Metrics")
    theirs, ours = pair(core, name)
    logp, old, advantages, mask = batch(5, 0.3, True)
    g = torch.Generator().manual_seed(5)
    weight, entropy = (torch.rand(logp.shape, generator=g, dtype=torch.float64) for _ in range(2))
    results = []
    for function in (theirs, ours):
        known = {"get_policy_loss_fn": lambda name, function=function: function, "agg_loss": core.agg_loss}
        ppo_loss = verl_source.caller(**known)
        x = logp.clone().requires_grad_()
        data = Data(
            response_mask=mask.long(), old_log_probs=old, advantages=advantages, rollout_is_weights=weight, dp_size=2,
            batch_num_tokens=101, global_batch_size=20,
        )  # fmt: skip
        config = verl_source.actor_config(entropy_coeff=0.1, loss_mode=name, **SETTINGS.get(name, {}))
        torch.manual_seed(0)
        loss, metrics = ppo_loss(config, {"log_probs": x, "entropy": entropy}, data)
        loss.backward()
        values = {key: value.aggregate() for key, value in metrics.items()}
        results.append((loss.detach(), x.grad, values))
    assert set(results[1][2]) == set(results[0][2]) | {"tokenrl/ess", "tokenrl/ratio_max"}
    assert max(differences(*results).values()) < 1e-7
