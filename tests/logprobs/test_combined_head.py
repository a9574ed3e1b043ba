"""The head of a z + b z': statistics and divergences of it, with gradients, beside the same from logits."""

import pytest
import torch

import tokenrl

B, T, D, E, V = 2, 3, 4, 5, 9


def case(shared=False, bias=False):
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, T, D), "weight": (V, D), "other_hidden": (B, T, D if shared else E), "other_weight": (V, E)}
    shapes |= {"bias": (V,), "other_bias": (V,)} if bias else {}
    x = {name: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for name, s in shapes.items()}
    if shared:
        x["other_weight"] = x["weight"]
    a = torch.rand(B, T, generator=g, dtype=torch.float64) + 0.5
    return x, a, torch.randint(0, V, (B, T), generator=g)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("b", [-0.5, "per token"])
def test_statistics_and_divergences(shared, bias, b):
    x, a, ids = case(shared, bias)
    b = -a / 2 if b == "per token" else b
    z = x["hidden"] @ x["weight"].t() + x.get("bias", 0)
    y = x["other_hidden"] @ x["other_weight"].t() + x.get("other_bias", 0)
    per_token = b[..., None] if isinstance(b, torch.Tensor) else b
    logits = a[..., None] * z + per_token * y
    hidden, weight = tokenrl.combined_head(**x, a=a, b=b)
    assert weight.shape[1] == (D if shared else D + E) + (2 if bias else 0)
    expected = tokenrl.token_logprobs(logits, ids, outputs=["logp", "lse"])
    found = tokenrl.linear_token_logprobs(hidden, weight, ids, outputs=["logp", "lse"])
    for name in ("logp", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    at = list({id(t): t for t in x.values()}.values())
    grads = [torch.autograd.grad((s.logp + 2 * s.lse).sum(), at, retain_graph=True) for s in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)
    student = x["hidden"].detach().flip(0).requires_grad_()
    frozen = hidden.detach(), weight.detach()
    found = tokenrl.linear_token_divergence(student, x["weight"].detach(), *frozen, "reverse_kl")
    other = tokenrl.token_divergence(student @ x["weight"].detach().t(), logits.detach(), "reverse_kl")
    torch.testing.assert_close(found, other)
    got, wanted = (torch.autograd.grad(value.sum(), student)[0] for value in (found, other))
    assert wanted.any()
    torch.testing.assert_close(got, wanted)


ERRORS = {
    "tokens": (
        {"other_hidden": torch.ones(B, 2, E)},
        r"other_hidden: got \[2, 2, 5\] and a head of 9, accepted: \[2, 3,",
    ),
    "vocabulary": ({"other_weight": torch.ones(8, E)}, r"other_hidden: got \[2, 3, 5\] and a head of 8, accepted: "),
    "a": ({"a": torch.ones(B)}, r"a: got shape \[2\], accepted: a number, or one per token, \[2, 3\]"),
    "b": ({"b": "1"}, "b: got '1', a str, accepted: a number"),
    "hidden": ({"hidden": 1.0}, "hidden: got 1.0, a float, accepted: a torch.Tensor"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    x, a, _ = case()
    given, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.combined_head(**x | {"a": a, "b": 1.0} | given)
