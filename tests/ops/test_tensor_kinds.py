"""Tensors of every kind that training hands over: made in inference mode, sharded, fake."""

import pytest
import torch
from cases import backends_to_test
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import tokenrl

ROWS, VOCAB = (2, 3), 11


def constants():
    g = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(0, 9, ROWS, generator=g),
        "old_logp": torch.randn(ROWS, generator=g) - 2,
        "advantages": torch.tensor([1.0, -1.0]),
        "mask": torch.tensor([[True, True, True], [True, True, False]]),
        "group_ids": torch.zeros(2, dtype=torch.int64),
        "keep_mask": torch.arange(VOCAB) < 10,
        "temperature": torch.full(ROWS, 0.7),
        "other_hidden": torch.randn(*ROWS, 4, generator=g),
    }


def lists():
    g = torch.Generator().manual_seed(2)
    return constants() | {
        "topk": torch.arange(4).expand(*ROWS, 4),
        "teacher": torch.randn(*ROWS, 4, generator=g) - 3,
        "spans": torch.tensor([0, 0, 1]),
        "matched": torch.arange(3),
    }


def policy(name):
    def loss(x, c, backend):
        more = {} if name == "kl_k3" else {"group_ids": c["group_ids"]}
        return tokenrl.policy_loss(name, x, c["old_logp"], c["advantages"], mask=c["mask"], backend=backend, **more)[0]

    return loss


def logprobs(x, c, backend):
    some = {name: c[name] for name in ("keep_mask", "temperature")}
    return tokenrl.token_logprobs(x, c["ids"], row_mask=c["mask"], backend=backend, **some).logp.sum()


def from_hidden(x, c, backend):
    weight = torch.linspace(-1, 1, 4 * VOCAB).view(VOCAB, 4)
    return tokenrl.linear_token_logprobs(x, weight, c["ids"], keep_mask=c["keep_mask"], backend=backend).logp.sum()


def linear_policy(x, c, backend):
    weight = torch.linspace(-1, 1, 4 * VOCAB).view(VOCAB, 4)
    return tokenrl.linear_policy_loss(
        "ctpo", x, weight, c["ids"], c["old_logp"], c["advantages"], mask=c["mask"], backend=backend
    )[0]


def divergence(x, c, backend):
    some = {name: c[name] for name in ("keep_mask", "temperature")}
    other = torch.linspace(-1, 1, x.numel()).view(x.shape)
    return tokenrl.token_divergence(x, other, "jsd", row_mask=c["mask"], backend=backend, **some).sum()


def distilled(x, c, backend):
    weight = torch.linspace(-1, 1, 4 * VOCAB).view(VOCAB, 4)
    some = {name: c[name] for name in ("keep_mask", "temperature", "mask")}
    heads = (x, weight, c["other_hidden"], weight.flip(0))
    return tokenrl.linear_distillation_loss("gkd", *heads, backend=backend, **some)[0]


def topk(x, c, backend):
    ids = c["topk"]
    logp = tokenrl.token_logprobs(x, ids, row_mask=c["mask"], outputs=["logp"], backend=backend).logp
    return tokenrl.topk_token_divergence(logp, c["teacher"], "jsd", topk_mask=ids > 0, row_mask=c["mask"]).sum()


def combined(x, c, backend):
    weight = torch.linspace(-1, 1, 4 * VOCAB).view(VOCAB, 4)
    head = tokenrl.combined_head(x, weight, c["other_hidden"], weight.flip(0), c["temperature"], -c["temperature"])
    return tokenrl.linear_token_logprobs(*head, c["ids"], backend=backend).logp.sum()


def spans(x, c, backend):
    """Of ULD and X-Token, of two texts of the same two spans."""
    found = [tokenrl.uld.span_probabilities(z, c["ids"][0], c["spans"], 2) for z in (x[0], x[1].detach())]
    values, _ = tokenrl.xtoken.h_kl(x[0], x[1].detach(), c["spans"], c["spans"], 2, c["matched"], c["matched"])
    return (tokenrl.uld.hybrid_uld(*found, c["matched"], c["matched"]) + values).sum()


def prefix(x, c, backend):
    return tokenrl.prefix_ratio(x, c["old_logp"], mask=c["mask"], flow="through", backend=backend).square().sum()


CALLS = {
    "logprobs": (logprobs, (*ROWS, VOCAB)), "from_hidden": (from_hidden, (*ROWS, 4)),
    "linear_policy": (linear_policy, (*ROWS, 4)), "prefix": (prefix, ROWS), "divergence": (divergence, (*ROWS, VOCAB)),
    "distilled": (distilled, (*ROWS, 4)), "topk": (topk, (*ROWS, VOCAB)), "combined": (combined, (*ROWS, 4)),
    "spans": (spans, (*ROWS, VOCAB)),
    **{name: (policy(name), ROWS) for name in ("grpo", "gmpo", "real", "cppo", "clip_cov", "fiberpo", "kl_k3")},
}  # fmt: skip


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", CALLS)
def test_constants_made_in_inference_mode_are_constants(name, backend):
    call, shape = CALLS[name]
    with torch.inference_mode():
        inference = lists()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) - 2
    found = []
    for given in (lists(), inference):
        leaf = x.clone().requires_grad_()
        loss = call(leaf, given, backend)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


def test_a_weight_made_in_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        weight = torch.ones(VOCAB, 4)
    with pytest.raises(ValueError, match=r"weight: got a tensor made in inference mode, .*weight.clone\(\)"):
        tokenrl.linear_token_logprobs(torch.ones(*ROWS, 4), weight, constants()["ids"])


def test_a_teachers_logits_made_in_inference_mode_are_refused_by_name_where_they_would_be_saved():
    with torch.inference_mode():
        other = torch.ones(*ROWS, VOCAB)
    logits = torch.zeros(*ROWS, VOCAB)
    assert not tokenrl.token_divergence(logits, other).any()
    with pytest.raises(ValueError, match=r"other_logits: got a tensor made in inference mode, .*torch.no_grad"):
        tokenrl.token_divergence(logits.requires_grad_(), other)


@pytest.fixture(scope="module")
def mesh():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield DeviceMesh("cpu", list(range(2)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Replicate(), Shard(0)])
@pytest.mark.parametrize("name", ["hidden", "weight", "ids", "old_logp", "mask", "advantages", "keep_mask"])
def test_a_sharded_tensor_is_refused_by_name(name, placement, mesh):
    given = constants() | {"hidden": torch.ones(*ROWS, 4), "weight": torch.ones(VOCAB, 4)}
    del given["temperature"], given["other_hidden"]
    given[name] = distribute_tensor(given[name], mesh, [placement])
    with pytest.raises(ValueError, match=rf"{name}: got a DTensor, .*{name}.full_tensor\(\)"):
        tokenrl.linear_policy_loss("grpo", **given)


@pytest.mark.parametrize("name", ["logits", "ids", "temperature"])
def test_sharded_logits_are_refused_by_name(name, mesh):
    given = constants() | {"logits": torch.ones(*ROWS, VOCAB)}
    given = {key: given[key] for key in ("logits", "ids", "temperature")}
    given[name] = distribute_tensor(given[name], mesh, [Replicate()])
    with pytest.raises(ValueError, match=rf"{name}: got a DTensor, .*{name}.full_tensor\(\)"):
        tokenrl.token_logprobs(**given)


@pytest.mark.parametrize("name", ["logits", "other_logits", "temperature", "other_keep_mask", "row_mask"])
def test_sharded_heads_of_a_divergence_are_refused_by_name(name, mesh):
    given = {
        "logits": torch.ones(*ROWS, VOCAB), "other_logits": torch.ones(*ROWS, VOCAB), "temperature": torch.ones(ROWS),
        "other_keep_mask": torch.ones(VOCAB, dtype=torch.bool), "row_mask": torch.ones(ROWS, dtype=torch.bool),
    }  # fmt: skip
    given[name] = distribute_tensor(given[name], mesh, [Replicate()])
    with pytest.raises(ValueError, match=rf"{name}: got a DTensor, .*{name}.full_tensor\(\)"):
        tokenrl.token_divergence(**given)


@pytest.mark.parametrize("name", ["logprobs", "from_hidden", "linear_policy", "grpo", "divergence", "distilled"])
def test_fake_tensors_are_followed(name):
    call, shape = CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {key: mode.from_tensor(x) for key, x in constants().items()}
        assert call(mode.from_tensor(torch.ones(shape)), given, "cpu").shape == ()
