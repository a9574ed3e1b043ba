"""Wrong arguments are named; batches with nothing in them have a defined result on every backend."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, on_backends, repeats

import tokenrl
from tokenrl.objectives.aggregations import AGGREGATIONS

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
INT = torch.int64


def call(objective="ppo", backend="reference", **changes):
    """policy_loss on a good padded batch [2, 3] with some arguments changed."""
    given = {
        "logp": torch.full((2, 3), -1.0), "old_logp": torch.full((2, 3), -1.1), "advantages": torch.ones(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    } | changes  # fmt: skip
    logp, old_logp, advantages = (given.pop(name) for name in ("logp", "old_logp", "advantages"))
    return tokenrl.policy_loss(objective, logp, old_logp, advantages, backend=backend, **given)


def packed_call(boundaries, tokens=6, **changes):
    sequences = len(boundaries) - 1
    good = {"logp": torch.zeros(tokens), "old_logp": None, "advantages": torch.ones(sequences), "mask": None}
    return call(**(good | {"cu_seqlens": torch.tensor(boundaries, dtype=INT)} | changes))


BAD_SHAPES = {
    "logp": torch.zeros(6),
    "old_logp": torch.zeros(3, 2),
    "advantages": torch.ones(3),
    "mask": torch.ones(3, 2, dtype=torch.bool),
    "segment_ids": torch.zeros(2, dtype=INT),
    "token_weight": torch.ones(2),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_a_wrong_shape_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name}: got shape \[.*accepted: "):
        call(**{name: BAD_SHAPES[name]})


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_a_wrong_shape_of_group_ids_is_named(shape):
    with pytest.raises(ValueError, match=r"^group_ids: got shape .* \[2\]"):
        call(group_ids=torch.zeros(shape, dtype=INT), aggregation="group-mean")


@pytest.mark.parametrize("name", ["logp", "old_logp", "ref_logp", "rollout_logp", "entropy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64])
def test_log_probs_of_a_wrong_dtype_are_named(name, dtype):
    wrong = {name: torch.zeros(2, 3, dtype=dtype)}
    with pytest.raises(ValueError, match=f"^{name}: got dtype {dtype}, accepted: float32 or float64"):
        call(**wrong)
    if name in ("ref_logp", "rollout_logp"):
        hidden, weight, ids = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=INT)
        with pytest.raises(ValueError, match=f"^{name}: got dtype {dtype}, accepted: float32 or float64"):
            tokenrl.linear_policy_loss("ppo", hidden, weight, ids, torch.zeros(2, 3), torch.ones(2), **wrong)


def test_a_mask_of_integers_is_named():
    with pytest.raises(ValueError, match=r"^mask: got dtype torch.int64.*mask.bool\(\)"):
        call(mask=torch.ones(2, 3, dtype=INT))


@pytest.mark.parametrize("name", ["segment_ids", "group_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_of_a_wrong_dtype_are_named(name, dtype):
    shape = (2, 3) if name == "segment_ids" else (2,)
    with pytest.raises(ValueError, match=f"^{name}: got dtype {dtype}, accepted: .*int64"):
        call(**{name: torch.zeros(shape, dtype=dtype)}, aggregation="group-mean" if name == "group_ids" else None)


@pytest.mark.parametrize("name", ["old_logp", "advantages", "mask", "segment_ids", "group_ids", "token_weight"])
def test_another_device_is_named(name):
    shape = (2,) if name in ("advantages", "group_ids") else (2, 3)
    dtype = torch.bool if name == "mask" else INT if name.endswith("ids") else torch.float32
    with pytest.raises(ValueError, match=f"^{name}: got device meta, accepted: the device of .*cpu"):
        call(**{name: torch.zeros(shape, dtype=dtype, device="meta")}, aggregation="group-mean",
             **({} if name == "group_ids" else {"group_ids": torch.zeros(2, dtype=INT)}))  # fmt: skip


def test_boundaries_and_bounds_on_another_device_are_named():
    with pytest.raises(ValueError, match="^cu_seqlens: got device meta"):
        packed_call([0, 6], cu_seqlens=torch.zeros(2, dtype=INT, device="meta"))
    with pytest.raises(ValueError, match="^eps_low: got device meta"):
        call(tokenrl.objective("ppo", eps_low=torch.ones(2, 3, device="meta")))
    with pytest.raises(ValueError, match="^ids: got device meta"):
        tokenrl.token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=INT, device="meta"))


@pytest.mark.parametrize("name", ["old_logp", "advantages", "token_weight"])
def test_a_constant_that_requires_grad_is_named(name):
    shape = (2,) if name == "advantages" else (2, 3)
    with pytest.raises(ValueError, match=rf"^{name}: got a tensor that requires grad.*{name}.detach\(\)"):
        call(**{name: torch.zeros(shape, requires_grad=True)})


@pytest.mark.parametrize("name", ["eps_low", "eps_high", "dual"])
def test_a_bound_that_requires_grad_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: got a tensor that requires grad"):
        tokenrl.objective("ppo", **{name: torch.ones(2, 3, requires_grad=True)})
    if name != "dual":
        bounds = {"eps_low": 0.1, "eps_high": 0.1, "power": 0.0} | {name: torch.ones(2, 3, requires_grad=True)}
        with pytest.raises(ValueError, match=f"^{name}: got a tensor that requires grad"):
            tokenrl.position_adaptive_clip(torch.zeros(2, 3), backend="reference", **bounds)


def test_parts_name_a_constant_that_requires_grad():
    with pytest.raises(ValueError, match="^old_logp: got a tensor that requires grad"):
        tokenrl.prefix_ratio(torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match="^advantages: got a tensor that requires grad"):
        tokenrl.group_aggregate(
            torch.zeros(2, 3), "balanced", advantages=torch.ones(2, requires_grad=True), group_ids=torch.arange(2)
        )
    with pytest.raises(ValueError, match="^normalizer: got a tensor that requires grad"):
        call(normalizer=torch.ones((), requires_grad=True))


@pytest.mark.parametrize(
    "make,text",
    [
        (lambda: call("gpso"), "objective: .*Did you mean 'gspo'"),
        (lambda: tokenrl.objective("ppo", eps_hi=0.1), "'ppo'.*Did you mean 'eps_high'"),
        (lambda: tokenrl.objective("cispo", bound="relatve"), "bound: .*Did you mean 'relative'"),
        (lambda: tokenrl.objective("ppo", statistic="span_men"), "statistic: .*Did you mean 'span_mean'"),
        (lambda: tokenrl.objective("ctpo", flow="locl"), "flow.*Did you mean 'local'"),
        (lambda: call(aggregation="token_mean"), "aggregation: .*Did you mean 'token-mean'"),
        (lambda: tokenrl.objective("ppo", aggregation="balance"), "aggregation: .*Did you mean 'balanced'"),
        (lambda: call(backend="referense"), "backend: .*Did you mean 'reference'"),
        (lambda: tokenrl.prefix_ratio(torch.zeros(1, 2), torch.zeros(1, 2), kind="summ"), "kind: .*Did you mean 'sum'"),
        (lambda: tokenrl.token_logprobs(torch.zeros(1, 2), torch.zeros(1, dtype=INT), outputs=("entrop",)),
         "outputs: .*Did you mean 'entropy'"),
    ],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("statistic,flow", [("token", "local"), ("prefix_min", "through"), ("prefix_sum", "")])
def test_a_flow_that_a_statistic_does_not_have_is_named(statistic, flow):
    with pytest.raises(ValueError, match=f"^flow of statistic '{statistic}': got '{flow}'"):
        tokenrl.objective("ppo", statistic=statistic, flow=flow)
    if statistic == "prefix_min":
        with pytest.raises(ValueError, match="^flow of statistic 'prefix_min'"):
            tokenrl.prefix_ratio(torch.zeros(1, 2), torch.zeros(1, 2), kind="min", flow=flow)


@pytest.mark.parametrize("boundaries", [[1, 6], [0, 5], [0, 7], [0, 4, 2, 6], [0, -1, 6], [0]])
def test_bad_boundaries_are_named(boundaries):
    with pytest.raises(ValueError, match=r"^cu_seqlens: got \[.*non-decreasing from 0 to the number of tokens, 6"):
        packed_call(boundaries)


@pytest.mark.parametrize("bad", [[0.0, 6.0], [[0, 6]], [], 6])
def test_boundaries_of_a_wrong_type_are_named(bad):
    bad = torch.tensor(bad)
    with pytest.raises(ValueError, match="^cu_seqlens: got .*int32 or int64"):
        packed_call([0, 6], cu_seqlens=bad)
    with pytest.raises(ValueError, match="^cu_seqlens: got .*int32 or int64"):
        tokenrl.aggregation_weights("token-mean", cu_seqlens=bad)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "hot"])
def test_a_temperature_that_is_not_positive_is_named(temperature):
    with pytest.raises(ValueError, match=f"^temperature: got {temperature!r}.*, accepted: a positive finite number"):
        tokenrl.token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=INT), temperature=temperature)


@EVERY_BACKEND
@pytest.mark.parametrize("bad", [4, -1, -101, 2**40])
def test_ids_out_of_range_are_named(bad, backend):
    if device_of(backend).type == "cuda":
        pytest.skip("on a GPU the check would be a host sync; there the result is nan")
    with pytest.raises(ValueError, match=rf"^ids: got values from .*{bad}.*0 to 3, or -100"):
        tokenrl.token_logprobs(torch.zeros(2, 4), torch.tensor([0, bad]), backend=backend)


@pytest.mark.parametrize(
    "logits,ids,name",
    [
        (torch.zeros(2, 4, dtype=INT), torch.zeros(2, dtype=INT), "logits"),
        (torch.zeros(4), torch.zeros((), dtype=INT), "logits"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=INT), "logits"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=INT), "ids"),
        (torch.zeros(2, 4), torch.zeros(2), "ids"),
    ],
)
def test_bad_logits_and_ids_are_named(logits, ids, name):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        tokenrl.token_logprobs(logits, ids)


def test_what_a_mode_needs_is_named():
    for mode in ("group-mean", "balanced"):
        with pytest.raises(ValueError, match=rf"^group_ids: got None.*\[2\].*'{mode}'"):
            call(aggregation=mode)
    with pytest.raises(ValueError, match="^advantages: got None.*'balanced'"):
        call("kl_k1", advantages=None, group_ids=torch.zeros(2, dtype=INT), aggregation="balanced")
    with pytest.raises(ValueError, match="^advantages: got None.*'ppo' needs them"):
        call(advantages=None)
    with pytest.raises(ValueError, match="^normalizer: got None.*seq-mean-token-sum-norm"):
        packed_call([0, 2, 6], aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="^mask: got None.*cu_seqlens"):
        tokenrl.aggregation_weights("token-mean")


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, torch.ones(2)])
def test_a_bad_normalizer_is_named(bad):
    with pytest.raises(ValueError, match="^normalizer: got "):
        call(normalizer=bad)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (0,)])
@pytest.mark.parametrize("name", ["ppo", "gspo", "ctpo", "minpro", "kl_k3", "real", "gmpo", "fipo", "clip_cov"])
def test_a_batch_without_tokens_has_loss_zero_and_a_graph(name, shape, backend):
    device = device_of(backend)
    for mode in ["group-mean"] if name == "real" else AGGREGATIONS:
        rows = shape[0]
        logp = torch.zeros(shape, device=device, requires_grad=True)
        more = {"cu_seqlens": torch.zeros(1, dtype=INT, device=device), "normalizer": 1.0} if len(shape) == 1 else {}
        ids = torch.zeros(rows, dtype=INT, device=device)
        loss, metrics = tokenrl.policy_loss(
            name, logp, None, torch.ones(rows, device=device), aggregation=mode, group_ids=ids, backend=backend,
            segment_ids=None if name == "real" else torch.zeros(shape, dtype=INT, device=device), **more,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(loss, logp)
        assert loss.item() == 0 and grad.shape == shape and metrics.tokens == 0 and math.isnan(metrics.ess)


def modes(name, backend):
    """All on the CPU; elsewhere they take turns over the rows, for which weights are numbers."""
    if name == "real":
        return ["group-mean"]
    turn = list(tokenrl.OBJECTIVES).index(name) % len(AGGREGATIONS)
    return [list(AGGREGATIONS)[turn]] if backend != "cpu" else AGGREGATIONS


@on_backends(tokenrl.OBJECTIVES, start=2)
def test_rows_that_are_masked_weigh_nothing(name, backend):
    """A masked row of NaN beside a good one changes nothing; a masked batch gives 0 with a graph."""
    device, mask = device_of(backend), torch.tensor([[True, True], [False, False]])
    logp, old = torch.where(mask, -1.0, torch.nan).to(device), torch.where(mask, -1.25, torch.inf).to(device)
    for mode in modes(name, backend):
        results = []
        for rows, keep in ((2, mask), (1, mask), (2, mask & False)):
            leaf = logp[:rows].clone().requires_grad_()
            loss, _ = tokenrl.policy_loss(
                name, leaf, old[:rows], torch.ones(rows, device=device), mask=keep[:rows].to(device),
                aggregation=mode, group_ids=torch.arange(rows, device=device), backend=backend,
            )  # fmt: skip
            results.append((loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()))
        (both, grad), (alone, grad_alone), (nothing, grad_nothing) = results
        repeats(both, alone, name, backend)
        repeats(grad[:1], grad_alone, name, backend)
        assert grad[1].tolist() == [0, 0]
        assert nothing == 0 and grad_nothing.count_nonzero() == 0 and grad_nothing.shape == (2, 2)


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 4), (2, 0, 4)])
def test_log_probs_of_no_rows(shape, backend):
    logits = torch.zeros(shape, device=device_of(backend), requires_grad=True)
    stats = tokenrl.token_logprobs(logits, torch.zeros(shape[:-1], dtype=INT, device=logits.device), backend=backend)
    (grad,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), logits)
    assert stats.logp.shape == stats.entropy.shape == shape[:-1] and grad.shape == shape
