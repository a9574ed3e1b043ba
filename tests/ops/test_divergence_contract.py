"""The contract of the ops of two heads: opcheck on every kind of arguments, gradcheck, torch.compile, refusals."""

import functools

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends, thinned

import tokenrl
from tokenrl.ops import backends
from tokenrl.ops.linear.divergence import LinearDivergenceInputs

KERNELS = kernel_backends()
VOCAB = 11
# The interpreter subtracts -inf from itself, and multiplies 0 by it, before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
# Shape of the rows, whether they lie apart in a larger buffer, whether everything is given, the kind.
ARGUMENTS = {
    "padded": ((2, 3), False, False, "forward_kl"),
    "padded everything": ((2, 3), False, True, "alpha_beta"),
    "packed": ((4,), False, False, "total_variation"),
    "packed everything": ((4,), False, True, "jsd"),
    "strided everything": ((2, 2), True, True, "skew_reverse_kl"),
}


def arguments(what, backend, of=None, known=False):
    """Of op divergence, or of its backward with respect to the logits named `of`. known: the statistics are given."""
    rows, strided, everything, name = ARGUMENTS[what]
    g, device = torch.Generator().manual_seed(0), device_of(backend)
    wide = [torch.randn(*rows, VOCAB + 5 * strided, generator=g).to(device) for _ in range(2)]
    pair = [x[..., 2 * strided : VOCAB + 2 * strided] for x in wide]
    lse = [x.logsumexp(-1) for x in pair]
    row_mask, transforms = None, [(0.9, None, float("inf"), 1.1, None)] * 2
    if everything:
        keep = (torch.arange(VOCAB) != 4).to(device).expand(*rows, VOCAB)
        row_mask = torch.arange(lse[0].numel(), device=device).view(rows) != 1
        transforms = [(1.0, lse[0].abs() / 2 + 0.5, cap, 0.9, keep) for cap in (5.0, 9.0)]
    kind = tokenrl.divergence(name)
    statistics = torch.stack([lse[0], torch.zeros_like(lse[0]), lse[1], torch.zeros_like(lse[0])])
    given = (row_mask, *transforms[0], *transforms[1], kind.name, kind.params())
    if of is None:
        return *(x.detach().requires_grad_() for x in pair), statistics if known else None, *given
    return lse[0].cos(), *pair, lse[1].sin(), of, statistics, *given


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("what", ARGUMENTS)
def test_opcheck(what, backend):
    ops = backends.BACKENDS[backend].ops
    for known in (False, True):
        torch.library.opcheck(ops.divergence.default, arguments(what, backend, known=known))
    for of in ("logits", "other_logits"):
        torch.library.opcheck(ops.divergence_backward.default, arguments(what, backend, of))


def linear_arguments(backend, weighed):
    g, device = torch.Generator().manual_seed(1), device_of(backend)
    hidden, weight, bias, other_hidden, other_weight, weights = (
        torch.randn(*shape, generator=g).to(device)
        for shape in ((6, 4), (VOCAB, 4), (VOCAB,), (6, 3), (VOCAB, 3), (6,))
    )
    ids = torch.zeros(6, 1, dtype=torch.int64, device=device)
    ids[3] = -100
    keep = (torch.arange(VOCAB) != 5).to(device)[None]
    trained = {"hidden": hidden, "weight": weight, "bias": bias}
    return LinearDivergenceInputs(
        **{name: x.requires_grad_() for name, x in trained.items()}, ids=ids, temperature=1.0,
        temperatures=weights.abs() + 0.5, softcap=5.0, logit_scale=0.9, keep_mask=keep, compute_dtype="float32",
        memory_budget=1 << 20, other_hidden=other_hidden, other_weight=other_weight, other_bias=None,
        other_temperature=0.8, other_temperatures=None, other_softcap=float("inf"), other_logit_scale=1.1,
        other_keep_mask=keep, kind="jsd", params=[0.3], weights=weights if weighed else None, wanted=[True] * 3,
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("weighed", [True, False])
def test_opcheck_from_hidden_states(weighed, backend):
    op = backends.BACKENDS[backend].ops.linear_divergence.default
    torch.library.opcheck(op, tuple(linear_arguments(backend, weighed)))


@pytest.mark.parametrize(
    "kind,backend", [(kind, b) for b in backends_to_test() for kind in thinned(list(tokenrl.DIVERGENCES), b)]
)
def test_gradcheck(kind, backend):
    """With respect to both heads' logits, plain and with everything, in fp64."""
    # The backward of the reference is torch's, which promises no bits.
    gradcheck = functools.partial(torch.autograd.gradcheck, nondet_tol=1e-12 if backend == "reference" else 0.0)
    device, g = device_of(backend), torch.Generator().manual_seed(2)
    rows, vocab = (2, 4) if interpreted(backend) else (3, 7)
    pair = [torch.randn(rows, vocab, generator=g, dtype=torch.float64).to(device).requires_grad_() for _ in range(2)]
    keep, row_mask = torch.arange(vocab, device=device) != 1, torch.arange(rows, device=device) != 1
    capped = {"softcap": 3.0, "other_softcap": 4.0, "logit_scale": 0.8, "keep_mask": keep, "other_keep_mask": keep}
    for options in ({"other_temperature": 1.3}, capped | {"row_mask": row_mask}):
        options |= {"temperature": 0.7, "backend": backend}
        assert gradcheck(lambda *z, options=options: tokenrl.token_divergence(*z, kind, **options), pair)


def pulled(call, *leaves):
    """The values, and the gradients that flow from all of them."""
    values = call(*leaves)
    values = [values] if isinstance(values, torch.Tensor) else [*values]
    total = sum(
        (value * torch.arange(1.0, value.numel() + 1, device=value.device).view_as(value)).sum() for value in values
    )
    grads = torch.autograd.grad(total, leaves)
    assert all(grad.any() for grad in grads)
    return *(value.detach() for value in values), *grads


@pytest.mark.parametrize("backend", backends_to_test())
def test_compiles_into_one_graph(backend):
    def of_logits(x, y, mask, temperature):
        how = {"row_mask": mask, "temperature": temperature, "softcap": 9.0, "backend": backend}
        return tokenrl.token_divergence(x, y, ["jsd", "reverse_kl"], **how)

    compiled = torch.compile(of_logits, fullgraph=True, backend="aot_eager")
    for rows in (3, 4):
        g = torch.Generator().manual_seed(rows)
        pair = [torch.randn(rows, 2, 13, generator=g).to(device_of(backend)).requires_grad_() for _ in range(2)]
        rest = (
            (torch.rand(rows, 2, generator=g) > 0.3).to(pair[0].device),
            torch.full((rows, 2), 0.7, device=pair[0].device),
        )
        found = (pulled(lambda *z, call=call, rest=rest: call(*z, *rest), *pair) for call in (of_logits, compiled))
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_by_either_head_raises(backend):
    pair = [torch.randn(2, 5, device=device_of(backend), requires_grad=True) for _ in range(2)]
    value = tokenrl.token_divergence(*pair, "jsd", backend=backend).sum()
    grads = torch.autograd.grad(value * 2, pair, create_graph=True)
    for grad in grads:
        for leaf in pair:
            with pytest.raises(RuntimeError, match="divergence: differentiated twice, accepted: once"):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_nobody_wants_is_not_made(backend, monkeypatch):
    """A frozen teacher's, or that of the other side alone; a strided upstream gradient is honoured."""
    made, ops = [], backends.BACKENDS[backend].ops
    real = ops.divergence_backward
    monkeypatch.setattr(ops, "divergence_backward", lambda *given: made.append(given[4]) or real(*given))
    x, y = (torch.randn(3, 5, dtype=torch.float64, device=device_of(backend)) for _ in range(2))
    for wanted, (own, other) in {"logits": (True, False), "other_logits": (False, True)}.items():
        found = []
        for name in (backend, "reference"):
            pair = [x.clone().requires_grad_(own), y.clone().requires_grad_(other)]
            value = tokenrl.token_divergence(*pair, "skew_forward_kl", backend=name).sum()
            found += torch.autograd.grad(value, [z for z in pair if z.requires_grad])
        torch.testing.assert_close(*found)
        assert found[0].any() and made.pop() == wanted and not made
