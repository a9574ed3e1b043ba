"""linear_preference_loss: the loss and gradients of preference_loss of the logits, in one pass or two; what is read."""

import pytest
import torch
from cases import backends_to_test, device_of, kernel_backends
from linear_cases import pair_budget

import tokenrl
from tokenrl.ops.linear import joined
from tokenrl.ops.linear.head import FEWEST_TOKENS

T, D, E, V = 9, 5, 3, 31
P = 15  # pairs of two chunks' worth of tokens, each above FEWEST_TOKENS
ROWS = {
    "dpo": {"pair_weight": torch.linspace(0, 2, P, dtype=torch.float64)}, "r_dpo": {}, "aot": {}, "tdpo2": {},
    "sparsepo": {}, "orpo": {"normalizer": 7.0}, "tpo": {"nll_normalizer": 9.0}, "kto": {"kl": 0.1}, "bco_unpaired": {},
}  # fmt: skip
# Rows of a chunk, and how many passes that makes; None: all that there is.
SIZES = {None: 1, 100: 1, FEWEST_TOKENS - 1: 2}
# What is interpreted or simulated: one row of each number of heads.
EVERY = [
    (n, b) for n in ROWS for b in backends_to_test() if b in ("reference", "cpu", "cuda") or n in ("orpo", "tdpo2")
]


def batch(name, backend="cpu", dtype=torch.float64, pairs=P):
    """(tensors with gradients, others, which tokens the loss reads): sequences of no pair, some in two, masks with
    holes, ids to ignore."""
    g, device, row = torch.Generator().manual_seed(0), device_of(backend), tokenrl.PREFERENCES[name]

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    number = 2 * pairs + 3
    mask = torch.rand(number, T, generator=g) > 0.25
    ids = torch.randint(V, (number, T), generator=g)
    ids[:, 4] = -100
    leaves = {"hidden": draw(number, T, D), "weight": draw(V, D), "bias": draw(V)}
    leaves["token_weight"] = draw(number, T).abs().to(torch.promote_types(dtype, torch.float32))
    more = {"mask": mask, "ids": ids} | ROWS[name]
    if row.divergence:
        leaves["divergence_weight"] = leaves["token_weight"] / 2
    read = mask & (ids != -100)
    if row.coupling == "labels":
        more["desirable"] = torch.rand(number, generator=g) > 0.5
    else:
        more["pairs"] = torch.randperm(2 * pairs, generator=g).view(pairs, 2)
        more["pairs"][1, 0] = more["pairs"][0, 0]  # meets two
        read[torch.ones(number).index_fill_(0, more["pairs"].flatten(), 0).bool()] = False
    if row.nll:
        more["nll_mask"] = torch.rand(number, T, generator=g) > 0.9
        read |= more["nll_mask"] & (ids != -100)
    if row.reference == "given":
        more |= {"ref_hidden": draw(number, T, E), "ref_weight": draw(V, E), "ref_bias": draw(V)}
    return leaves, {key: x.to(device) if torch.is_tensor(x) else x for key, x in more.items()}, read.to(device)


def expected(name, leaves, more, **options):
    """From logits, by the reference."""
    given = dict(leaves) | more
    hidden, weight, bias, ids = (given.pop(key) for key in ("hidden", "weight", "bias", "ids"))
    logits, mask = hidden @ weight.t() + bias, given.pop("mask") & (ids != -100)
    how = {"backend": "reference"} | options
    logp = tokenrl.token_logprobs(logits, ids, outputs=["logp"], **how).logp
    if "nll_mask" in given:
        given["nll_mask"] = given["nll_mask"] & (ids != -100)
    if "ref_hidden" in given:
        others = given.pop("ref_hidden") @ given.pop("ref_weight").t() + given.pop("ref_bias")
        given["ref_logp"] = tokenrl.token_logprobs(others, ids, outputs=["logp"], **how).logp
        if tokenrl.PREFERENCES[name].divergence:
            given["divergence"] = tokenrl.token_divergence(logits, others, other_softcap=how.get("softcap"), **how)
    return *tokenrl.preference_loss(name, logp, mask=mask, **given), logp


def poisoned(x, read):
    return torch.where(read[..., None], x, torch.nan)


def budget_of(rows, name, size=8):
    """For chunks of so many rows, of both heads where there is a divergence."""
    if rows is None or tokenrl.PREFERENCES[name].divergence:
        return None if rows is None else pair_budget(rows, D, V, size)
    return rows * (V * size + D * size + 128)


def alike(found, truth, at, rtol=1e-9):
    torch.testing.assert_close(found[0], truth[0].to(found[0].dtype), rtol=rtol, atol=1e-12)
    for one, two in zip(found[1][:4], truth[1], strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=1e-12, equal_nan=True)
    both = [torch.autograd.grad(1.5 * loss, at, retain_graph=True) for loss in (found[0], truth[0])]
    for got, wanted in zip(*both, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=10 * rtol, atol=1e-12)


@pytest.mark.parametrize("name,backend", EVERY)
def test_it_is_the_loss_of_the_logits(name, backend):
    """What no one reads may hold anything; two passes where a part does not fit, or all sequences meet."""
    slow = backend not in ("reference", "cpu", "cuda")
    leaves, more, read = batch(name, backend, pairs=2 if slow else P)
    at = [x.requires_grad_() for x in leaves.values()]
    options = {"temperature": 1.3, "softcap": 5.0} if name in ("r_dpo", "tdpo2") else {}
    truth = expected(name, leaves, more, **options)
    spoiled = leaves | {"hidden": poisoned(leaves["hidden"], read)}
    if "ref_hidden" in more:
        more["ref_hidden"] = poisoned(more["ref_hidden"], read & more["mask"])
    for rows, passes in list(SIZES.items())[: 1 if slow else None]:
        found = tokenrl.linear_preference_loss(
            name, **spoiled, **more, **options, memory_budget=budget_of(rows, name), backend=backend
        )
        meet = name in ("aot", "bco_unpaired") and rows is not None
        assert found[1].passes == (2 if backend == "reference" or meet else passes)
        torch.testing.assert_close(found[1].logp, torch.where(read, truth[2], 0).detach(), rtol=1e-9, atol=1e-12)
        alike(found, truth, at)


@pytest.mark.parametrize("name", ["dpo", "sparsepo", "tpo"])
def test_packed_is_padded(name):
    leaves, more, _ = batch(name)
    at = [x.requires_grad_() for x in leaves.values()]
    truth, found = (tokenrl.linear_preference_loss(name, **leaves, **more), None)
    per_token = {
        key: x for key, x in (leaves | more).items() if x is not None and getattr(x, "shape", ())[:2] == (33, T)
    }
    flat = leaves | more | {key: x.flatten(0, 1) for key, x in per_token.items()}
    found = tokenrl.linear_preference_loss(name, **flat, cu_seqlens=torch.arange(0, 33 * T + 1, T))
    alike(found, (truth[0], truth[1][:4]), at)


@pytest.mark.parametrize("backend", [name for name in kernel_backends() if name in ("cpu", "cuda")])
def test_only_what_is_wanted_is_made(backend, monkeypatch):
    leaves, more, read = batch("dpo", backend)
    hidden = leaves["hidden"].requires_grad_()
    seen, run = [], joined.run

    def watched(inputs, heads, other, rows, chunks, ranks, evaluate, grads):
        assert grads.weight is None and grads.bias is None and grads.hidden is not None and other is None
        seen.extend(chunks)
        return run(inputs, heads, other, rows, chunks, ranks, evaluate, grads)

    monkeypatch.setattr(joined, "run", watched)
    loss, metrics = tokenrl.linear_preference_loss(
        "dpo", **leaves, **more, memory_budget=budget_of(100, "dpo"), backend=backend
    )
    assert len(seen) > 1 and torch.equal(torch.cat(seen).sort().values, read.flatten().nonzero()[:, 0])
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    unread = ~read
    unread[more["pairs"][0, 1]] = True  # of a pair that weighs nothing; the chosen one meets another
    assert torch.equal(grad.any(-1), ~unread) and not metrics.margins.requires_grad
    with pytest.raises(RuntimeError, match="linear_preference_loss: differentiated twice, accepted: once"):
        torch.autograd.grad(grad.sum(), hidden)
    seen.clear()
    with torch.no_grad():
        again, metrics = tokenrl.linear_preference_loss("dpo", **leaves, **more, backend=backend)
    assert not seen and metrics.passes == 1 and not again.requires_grad
    torch.testing.assert_close(again, loss.detach())


def test_a_frozen_head_of_both():
    leaves, more, _ = batch("tdpo2")
    hidden, weight, bias = leaves["hidden"].requires_grad_(), leaves["weight"], leaves["bias"]
    more["ref_hidden"] = 0.9 * hidden.detach()
    found, truth = (
        tokenrl.linear_preference_loss("tdpo2", hidden, weight, bias=bias, **{**more, **head})
        for head in ({"ref_weight": None, "ref_bias": None}, {"ref_weight": weight, "ref_bias": bias})
    )
    alike(found, (truth[0], truth[1][:4]), [hidden])
    for trained in (weight, bias):
        trained.requires_grad_()
        with pytest.raises(ValueError, match="^ref_weight: got None, accepted: the reference's, as weight is trained"):
            tokenrl.linear_preference_loss(
                "tdpo2", hidden, weight, bias=bias, **{**more, "ref_weight": None, "ref_bias": None}
            )
        trained.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [name for name in kernel_backends() if name in ("cpu", "cuda")])
def test_narrow_dtypes(backend, dtype):
    """Gradients have the dtype of their tensors, autocast changes nothing, and a small upstream gradient is no zero."""
    name = "tpo" if dtype == torch.float16 else "tdpo2"
    leaves, more, _ = batch(name, backend, dtype)
    wide = {key: x.double().requires_grad_() for key, x in leaves.items()}
    at = [x.requires_grad_() for x in leaves.values()]
    exact = {key: x.double() if torch.is_tensor(x) and x.dtype == dtype else x for key, x in more.items()}
    truth = torch.autograd.grad(
        tokenrl.linear_preference_loss(name, **wide, **exact, backend=backend)[0], wide.values()
    )
    device, budget = device_of(backend).type, budget_of(100, name, 2)
    loss, metrics = tokenrl.linear_preference_loss(name, **leaves, **more, memory_budget=budget, backend=backend)
    with torch.autocast(device, torch.bfloat16 if dtype == torch.float16 else torch.float16), pytest.warns(UserWarning):
        cast, _ = tokenrl.linear_preference_loss(name, **leaves, **more, memory_budget=budget, backend=backend)
    assert metrics.passes == 1 and torch.equal(cast, loss)
    for got, again, wanted in zip(*(torch.autograd.grad(x, at) for x in (loss, cast)), truth, strict=True):
        assert got.dtype == again.dtype and torch.equal(got, again)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=4e-2 * wanted.abs().max().item())


def test_frozen_states_of_inference_mode():
    leaves, more, _ = batch("tdpo2")
    weight = leaves["weight"].requires_grad_()
    truth = tokenrl.linear_preference_loss("tdpo2", **leaves, **more)
    with torch.inference_mode():
        made = {key: x.clone() for key, x in (leaves | more).items() if key not in ("weight", "bias")}
    made["ref_weight"], made["ref_bias"] = more["ref_weight"], more["ref_bias"]
    found = tokenrl.linear_preference_loss("tdpo2", weight=weight, bias=leaves["bias"], **made)
    alike(found, (truth[0], truth[1][:4]), [weight])


def test_no_pair_at_all():
    leaves, more, _ = batch("dpo")
    hidden = leaves["hidden"].requires_grad_()
    more |= {"pairs": torch.zeros(0, 2, dtype=torch.int64), "pair_weight": None}
    loss, metrics = tokenrl.linear_preference_loss("dpo", **leaves, **more)
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any() and metrics.accuracy == 0


CASE, MORE, _ = batch("tdpo2")
NOTHING = {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
ERRORS = {
    "objective": ({"objective": "dp"}, "objective: got 'dp', accepted: dpo"),
    "none": (NOTHING, "ref_hidden: got None, accepted: one; objective"),
    "weight": ({"ref_hidden": None, "ref_bias": None}, "ref_weight: got one, accepted: None without ref_hidden"),
    "bias": ({"ref_weight": None}, "ref_bias: got one, accepted: None without ref_weight"),
    "both": ({"ref_logp": CASE["token_weight"]}, "ref_logp: got one, accepted: None beside ref_hidden"),
    "neither": ({"objective": "dpo", "divergence_weight": None} | NOTHING, "ref_logp: got None, accepted: one"),
    "unused": ({"objective": "simpo", "divergence_weight": None}, "ref_hidden: got one, accepted: None; objective"),
    "grad": ({"ref_weight": torch.ones(V, E).double().requires_grad_()}, "ref_weight: got a tensor that requires grad"),
    "width": ({"ref_weight": MORE["ref_weight"][:, :2]}, r"ref_weight: got shape \[31, 2\]"),
    "vocabulary": ({"ref_weight": MORE["ref_weight"][:9], "ref_bias": None}, r"ref_hidden: got a head of logits \[33"),
    "ids": ({"ids": MORE["ids"][..., None]}, r"ids: got shape \[33, 9, 1\], accepted: one id per token"),
    "vocab": ({"ids": MORE["ids"] + V}, "ids: got values from"),
    "mask": ({"nll_mask": MORE["mask"]}, "nll_mask: got one, accepted: None; objective 'tdpo2'"),
    "nll_mask": (
        {"objective": tokenrl.preference("tdpo2", nll=1.0), "nll_mask": MORE["ids"]},
        "nll_mask: got dtype torch.int64",
    ),
    "budget": ({"memory_budget": 100}, "memory_budget: got 100 bytes, accepted: more"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.linear_preference_loss(**{"objective": "tdpo2"} | CASE | MORE | changes)


def test_one_trace_with_a_reference_made_in_it():
    """By two passes, whose sums come in another order."""
    leaves, more, _ = batch("dpo", pairs=2)
    del more["pair_weight"]
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}

    def loss(hidden, weight):
        return tokenrl.linear_preference_loss("dpo", **leaves | {"hidden": hidden, "weight": weight}, **more)[0]

    given = leaves["hidden"], leaves["weight"]
    values = [f(*given) for f in (loss, torch.compile(loss, fullgraph=True, backend="eager"))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, given) for value in values))
