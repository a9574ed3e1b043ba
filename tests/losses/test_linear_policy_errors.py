"""Wrong arguments of linear_policy_loss: the message names the argument, what was given and what is accepted."""

import re

import pytest
import torch
from cases import kernel_backends

import tokenrl

EVERY_KERNEL = pytest.mark.parametrize("backend", kernel_backends())
INT, META = torch.int64, torch.device("meta")
KL_ROWS = "kl_abs, kl_k1, kl_k2, kl_k3, kl_k1_unbiased, kl_abs_unbiased, kl_k3_unbiased"


def call(objective="ppo", backend="reference", **changes):
    """linear_policy_loss on a good padded batch [2, 3] of V = 5, D = 4 with some arguments changed."""
    given = {
        "hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(5, 4), "ids": torch.zeros(2, 3, dtype=INT),
        "old_logp": torch.full((2, 3), -1.6), "advantages": torch.ones(2),
    } | changes  # fmt: skip
    order = [given.pop(name) for name in ("hidden", "weight", "ids", "old_logp", "advantages")]
    return tokenrl.linear_policy_loss(objective, *order, backend=backend, **given)


def refused(name, given, accepted, **changes):
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: got {given}, accepted: {accepted}")):
        call(**changes)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (6,), ()])
def test_ids_of_a_wrong_shape_are_named(shape):
    refused("ids", f"shape {list(shape)}", "one id per row of logits, [2, 3]", ids=torch.zeros(shape, dtype=INT))


def test_several_ids_per_token_are_named():
    """token_logprobs takes them; a policy samples one."""
    refused("ids", "shape [2, 3, 2]", "one id per token, [2, 3]", ids=torch.zeros(2, 3, 2, dtype=INT))


def test_a_packed_batch_without_boundaries_is_named():
    packed = {"hidden": torch.zeros(6, 4), "ids": torch.zeros(6, dtype=INT), "old_logp": torch.zeros(6)}
    refused("ids", "shape [6] without cu_seqlens", "padded [B, T], or packed [N] with cu_seqlens", **packed)
    refused("ids", "shape [2, 3] with cu_seqlens", "packed [N]", cu_seqlens=torch.tensor([0, 6]))


@pytest.mark.parametrize(
    "kl,nearest", [("k3", "kl_k3"), ("kl_k3_unbias", "kl_k3_unbiased"), ("kl_k4", "kl_k3"), ("gspo", None)]
)
def test_a_kl_that_is_no_row_of_kl_is_named_with_the_nearest(kl, nearest):
    with pytest.raises(ValueError) as raised:
        call(kl=kl, ref_logp=torch.zeros(2, 3), kl_coef=0.1)
    assert str(raised.value).startswith(f"kl: got {kl!r}, accepted: ")
    assert KL_ROWS in str(raised.value) and (nearest is None or f"Did you mean '{nearest}'?" in str(raised.value))


@pytest.mark.parametrize("kl", ["kl_k2", "kl_k3"])
def test_a_kl_over_spans_or_with_a_bound_per_token_is_named(kl):
    ref_logp = torch.zeros(2, 3)
    refused("kl", f"'{kl}'", KL_ROWS, kl=tokenrl.objective(kl, statistic="span_mean"), ref_logp=ref_logp)
    if kl == "kl_k3":
        row = tokenrl.objective(kl, ceiling=torch.ones(2, 3))
        refused("kl", "a gate with a tensor for a parameter", "numbers", kl=row, ref_logp=ref_logp)


@pytest.mark.parametrize("coef", [0.1, -1.0])
def test_a_kl_coef_without_ref_logp_is_named(coef):
    refused("ref_logp", "None", f"one log-prob per token, [2, 3]; kl_coef is {coef}", kl_coef=coef)


def test_a_ref_logp_that_requires_grad_is_named():
    ref_logp = torch.zeros(2, 3, requires_grad=True)
    refused("ref_logp", "a tensor that requires grad", "a constant (ref_logp.detach())", ref_logp=ref_logp)


WRONG_SHAPES = {
    "ref_logp": "one value per token, [2, 3]",
    "old_logp": "one value per token, [2, 3]",
    "token_weight": "one value per token, [2, 3]",
    "advantages": "one per sequence, [2], or per token, [2, 3]",
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_wrong_shape_or_device_is_named(name):
    refused(name, "shape [3, 2]", WRONG_SHAPES[name], **{name: torch.zeros(3, 2)})
    accepted = "the device of the other tensors, cpu"
    refused(name, "device meta", accepted, **{name: torch.zeros(2, 3, device=META)})


@pytest.mark.parametrize("name", ["old_logp", "advantages", "token_weight"])
def test_a_constant_that_requires_grad_is_named(name):
    shape = (2,) if name == "advantages" else (2, 3)
    accepted = f"a constant ({name}.detach())"
    refused(name, "a tensor that requires grad", accepted, **{name: torch.zeros(shape, requires_grad=True)})


@pytest.mark.parametrize("objective", ["ppo", "ctpo", "gspo"])
def test_missing_advantages_are_named(objective):
    accepted = f"one per sequence or one per token; '{objective}' needs them"
    refused("advantages", "None", accepted, objective=objective, advantages=None)


def test_the_reference_backend_takes_no_main_grad():
    accepted = "None: the reference backend leaves its backward to autograd"
    refused("main_grad", "a tensor", accepted, main_grad=torch.zeros(5, 4))


@pytest.mark.parametrize("bad", [0, -1, True, 1e9, "1 GiB"])
def test_a_wrong_memory_budget_is_named(bad):
    given = bad if type(bad) is int else f"{bad!r}, a {type(bad).__name__}"
    accepted = "a positive number of bytes, as an integer (int(memory_budget))"
    refused("memory_budget", given, accepted, memory_budget=bad)


@EVERY_KERNEL
def test_a_memory_budget_that_holds_no_tile_is_named(backend):
    accepted = "more: a tile of one row and 5 columns, with what belongs to it, does not fit into half of it"
    refused("memory_budget", "99 bytes", accepted, memory_budget=99, backend=backend)


@EVERY_KERNEL
def test_an_id_beyond_the_vocabulary_is_named(backend):
    """But for tokens that the mask leaves out."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the check would be a host sync")
    ids, mask = torch.tensor([[0, 4, 5], [0, 0, 0]]), torch.tensor([[True, True, False]] * 2)
    refused("ids", "values from 0 to 5", "0 to 4, or -100 to ignore a row", ids=ids, backend=backend)
    call(ids=ids, mask=mask, backend=backend)


def test_an_unknown_objective_and_aggregation_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="^objective: got 'cptpo', accepted: .*Did you mean 'ctpo'"):
        call(objective="cptpo")
    with pytest.raises(ValueError, match="^aggregation: got 'tokens-mean', accepted: .*Did you mean 'token-mean'"):
        call(aggregation="tokens-mean")
