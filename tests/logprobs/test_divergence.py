"""token_divergence on every backend: the tolerance rule, both gradients, masks, infinities, properties, errors."""

import dataclasses
import itertools

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends

import tokenrl
from tokenrl.instruments.parity import close

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
KERNELS = pytest.mark.parametrize("backend", kernel_backends())
EVERY_KIND = pytest.mark.parametrize("kind", tokenrl.DIVERGENCES)
TRANSFORMS = {
    "plain": {},
    "softcaps": {
        "temperature": 0.8,
        "softcap": 9.0,
        "other_softcap": 12.0,
        "logit_scale": 0.9,
        "other_logit_scale": 1.2,
    },
    "kept": {"keep_mask": torch.arange(211) != 5, "other_keep_mask": torch.arange(211) != 5, "other_temperature": 1.3},
}
# The interpreter subtracts -inf from itself before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def pair(seed=0, rows=(2, 3), vocab=211, spread=0.7):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*rows, vocab, generator=g)
    return logits, logits + spread * torch.randn(*rows, vocab, generator=g)


def run(pair, kind, backend, dtype, device="cpu", **more):
    """(value, gradients of both) of upstream gradients 1, 2, 3, ..."""
    leaves = [x.to(device, dtype).requires_grad_() for x in pair]
    more = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    found = tokenrl.token_divergence(*leaves, kind, backend=backend, **more)
    weights = torch.arange(1.0, found.numel() + 1, device=device).to(found.dtype).view(found.shape)
    return found.detach(), *torch.autograd.grad((weights * found).sum(), leaves)


CASES = [*itertools.product([torch.float32, torch.bfloat16], TRANSFORMS, tokenrl.DIVERGENCES)]
EVERY_CASE = [  # the interpreter takes every seventh, so that neither kinds nor transforms come again
    (*case, b) for b in kernel_backends() for case in (CASES[::7] if interpreted(b) else CASES)
]


@pytest.mark.parametrize("dtype,transform,kind,backend", EVERY_CASE)
def test_the_tolerance_rule(dtype, transform, kind, backend):
    given = [x.to(dtype) for x in pair()]
    more = TRANSFORMS[transform] | {"row_mask": torch.tensor([[True, False, True], [True, True, True]])}
    truth = run(given, kind, "reference", torch.float64, **more)
    base = run(given, kind, "reference", dtype, **more)
    found = run(given, kind, backend, dtype, device_of(backend), **more)
    for what, *three in zip(("value", "gradient", "gradient of the other"), found, truth, base, strict=True):
        assert three[1].any() and not three[0][0, 1].any()
        close(three[0].cpu(), three[1], three[2], what)


@EVERY_BACKEND
@EVERY_KIND
def test_the_formula_typed_out(kind, backend):
    """On four entries, in Python's own numbers, with parameters other than the defaults."""
    p, r = (torch.tensor(x, dtype=torch.float64) for x in ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.25, 0.25]))
    mix = lambda share: (1 - share) * p + share * r  # noqa: E731
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    row, formula = {
        "forward_kl": ({}, lambda: kl(r, p)),
        "reverse_kl": ({}, lambda: kl(p, r)),
        "cross_entropy": ({}, lambda: -(r * p.log()).sum()),
        "jsd": ({"beta": 0.3}, lambda: 0.3 * kl(r, mix(0.3)) + 0.7 * kl(p, mix(0.3))),
        "skew_forward_kl": ({"share": 0.2}, lambda: kl(r, mix(0.2))),
        "skew_reverse_kl": ({"share": 0.2}, lambda: kl(p, mix(0.8))),
        "total_variation": ({}, lambda: (p - r).abs().sum() / 2),
        "bhattacharyya": ({}, lambda: (p * r).sqrt().sum()),
        "squared_hellinger": ({}, lambda: ((p.sqrt() - r.sqrt()) ** 2).sum() / 2),
        "alpha_beta": (
            {"alpha": 0.5, "beta": 1.5},
            lambda: -(r**0.5 * p**1.5 - 0.25 * r**2 - 0.75 * p**2).sum() / 0.75,
        ),
    }[kind]
    found, *grads = run((p.log()[None], r.log()[None]), tokenrl.divergence(kind, **row), backend, torch.float64)
    p.requires_grad_(), r.requires_grad_()
    value = formula()
    for x, grad, by in zip((p, r), grads, torch.autograd.grad(value, (p, r), allow_unused=True), strict=True):
        expected = x * (by - (x * by).sum())
        torch.testing.assert_close(grad[0].cpu(), expected.detach(), rtol=1e-9, atol=1e-12)
    assert found.item() == pytest.approx(value.item(), rel=1e-10)


@EVERY_BACKEND
@EVERY_KIND
def test_properties(kind, backend):
    """Zero iff equal; a shift of either head's logits, the order of the vocabulary and an entry that neither has change
    nothing; gradients add up to 0."""
    device = device_of(backend)
    x, y = (t[0].double().to(device) for t in pair(1))
    value, *grads = run((x, y), kind, backend, torch.float64, device)
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(3)).to(device)
    nothing = torch.full_like(x[:, :1], -torch.inf)
    for changed in (
        (x + 7, y - 3),
        (x[:, order], y[:, order]),
        (torch.cat([x, nothing], 1), torch.cat([y, nothing], 1)),
    ):
        torch.testing.assert_close(run(changed, kind, backend, torch.float64, device)[0], value, rtol=1e-9, atol=1e-12)
    same = tokenrl.token_divergence(x, x, kind, backend=backend)
    at_equal = {"bhattacharyya": 1.0, "cross_entropy": None}.get(kind, 0.0)
    if at_equal is not None:
        torch.testing.assert_close(same, torch.full_like(same, at_equal), atol=1e-12, rtol=1e-12)
        assert (value - at_equal).abs().min() > 1e-3
    if kind in ("jsd", "total_variation", "bhattacharyya", "squared_hellinger"):
        torch.testing.assert_close(run((y, x), kind, backend, torch.float64, device)[0], value, rtol=1e-9, atol=1e-12)
    for grad in grads:
        assert grad.sum(-1).abs().max() < 1e-9


@EVERY_BACKEND
def test_logits_that_are_taken_out(backend):
    """0 log 0 = 0; an entry that only one head has makes the one KL infinite and the other not."""
    x = torch.tensor([[1.0, 2.0, -torch.inf, 0.5]], dtype=torch.float64)
    y = torch.tensor([[0.5, 1.0, 1.5, -torch.inf]], dtype=torch.float64)
    both = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    assert run((x, y), "forward_kl", backend, torch.float64, device_of(backend))[0].item() == torch.inf
    value, grad, other = run((both, y), "reverse_kl", backend, torch.float64, device_of(backend))
    assert value.isfinite().all() and grad.any() and not grad[0, 2:].any() and other[0, 3] == 0
    for kind in ("jsd", "total_variation", "skew_forward_kl", "squared_hellinger"):
        found = run((x, y), kind, backend, torch.float64, device_of(backend))
        assert all(part.isfinite().all() for part in found) and found[1][0, 2] == 0 and found[2][0, 3] == 0


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "skew_forward_kl", "bhattacharyya"])
@EVERY_BACKEND
def test_rows_without_a_distribution_are_nan_and_masked_rows_are_never_read(kind, backend):
    x, y = pair(2, rows=(4,))
    x[1], y[2], x[3] = torch.nan, -torch.inf, torch.nan
    mask = torch.tensor([True, True, True, False])
    value, grad, other = run((x, y), kind, backend, torch.float32, device_of(backend), row_mask=mask)
    assert value.isnan().tolist() == [False, True, True, False] and value[3] == 0
    assert grad[0].isfinite().all() and not grad[3].any() and not other[3].any()
    assert grad[1].isnan().all()


@EVERY_BACKEND
def test_several_kinds_and_a_tempered_self(backend):
    """Of itself at another temperature both gradients meet in one tensor: the target attached, or detached."""
    x = pair(3, rows=(3,))[0].double().to(device_of(backend)).requires_grad_()
    found = tokenrl.token_divergence(x, x.detach(), ["forward_kl", "jsd"], other_temperature=2.0, backend=backend)
    z = x / 2
    expected = (z.softmax(-1) * (z.log_softmax(-1) - x.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(found.forward_kl, expected.detach(), check_device=False)
    assert len([*found]) == 2 and not torch.equal(found.jsd, found.forward_kl)
    attached = tokenrl.token_divergence(x, x, "forward_kl", other_temperature=2.0, backend=backend)
    got, truth = (torch.autograd.grad(value.sum(), x)[0] for value in (attached, expected))
    assert truth.any()
    torch.testing.assert_close(got, truth)


@EVERY_BACKEND
def test_strided_rows_and_per_row_temperatures(backend):
    x, y = (t.double().to(device_of(backend)) for t in pair(4, rows=(2, 5), vocab=40))
    temperature = torch.rand(2, 3, device=x.device) + 0.5
    views = [t[:, 1:4, 3:36] for t in (x, y)]
    found = run(views, "reverse_kl", backend, torch.float64, x.device, temperature=temperature)
    scaled = [view / temperature[..., None] for view in views]
    expected = run(scaled, "reverse_kl", "reference", torch.float64, x.device)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1] / temperature[..., None])
    none = [torch.zeros(0, 5, 2, device=x.device)[..., 0] for _ in views]
    assert run(none, "reverse_kl", backend, torch.float32)[1].shape == (0, 5)


@pytest.mark.parametrize("backend", [b for b in kernel_backends() if b == "cpu"])
def test_the_bits_of_a_row_are_its_own(backend):
    x, y = pair(5, rows=(6,), vocab=70001)
    whole = run((x, y), "jsd", backend, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = run((x[2:3], y[2:3]), "jsd", backend, torch.float32)
    torch.set_num_threads(threads)
    assert torch.equal(alone[0], whole[0][2:3])


X = torch.zeros(2, 5)
ERRORS = {
    "kind": ({"kind": "forward-kl"}, "kind: got 'forward-kl', accepted: forward_kl, .* Did you mean 'forward_kl'"),
    "no kind": ({"kind": None}, "kind: got None, accepted: a name of tokenrl.DIVERGENCES"),
    "kinds": ({"kind": ["jsd", "jsd"]}, "kind: got .*, accepted: at least one, each once"),
    "shape": (
        {"other_logits": X[:, 1:]},
        r"other_logits: got torch.float32 \[2, 4\] on cpu, accepted: those of logits",
    ),
    "dtype": ({"other_logits": X.half()}, r"other_logits: got torch.float16 \[2, 5\]"),
    "mask": ({"row_mask": torch.ones(3, dtype=torch.bool)}, "row_mask: got torch.bool"),
    "softcap": ({"other_softcap": -1.0}, "other_softcap: got -1.0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.token_divergence(**{"logits": X, "other_logits": X} | changes)


def test_errors_of_parameters():
    for given, message in (
        ({"kind": "jsd", "beta": 1.0}, "beta: got 1.0, accepted: a number above 0 and below 1"),
        ({"kind": "jsd", "share": 0.5}, "parameter of 'jsd': got 'share', accepted: beta"),
        ({"kind": "alpha_beta", "alpha": 0.0}, "alpha: got 0.0, accepted: a number above 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            tokenrl.divergence(**given)
    assert dataclasses.replace(tokenrl.divergence("jsd", beta=0.9)).params() == [0.9]
