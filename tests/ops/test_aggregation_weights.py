"""Op aggregation_weights: the bits of the reference on every backend, and graphs that no length is burnt into."""

import itertools

import pytest
import torch
from cases import device_of, interpreted, kernel_backends
from graphs import counted

import tokenrl
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.ops import backends, reference

KERNELS = kernel_backends()
SPANS, BY_GROUP, UNITS = ("one", "inverse_length"), ("group", "balanced"), ("one", "tokens", "rows", "groups")


def weights_of(backend, sequences, span, unit, per_token):
    """(arguments, results) of the op; masked cells in between, and from three sequences on some without any token."""
    g, device = torch.Generator().manual_seed(sequences), device_of(backend)
    lengths = torch.randint(0, 9, (sequences,), generator=g)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
    tokens = int(cu[-1])
    mask, groups = (torch.rand(tokens, generator=g) > 0.3).to(device), (torch.arange(sequences) % 7 - 3).to(device)
    advantages = torch.randint(-2, 3, (tokens if per_token else sequences,), generator=g).to(device).double()
    args = (mask, cu, tokens, advantages, groups if span in BY_GROUP else None, span, unit, 0.7)
    return args, backends.BACKENDS[backend].ops.aggregation_weights(*args)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("unit", UNITS)
def test_weights_have_the_bits_of_the_reference(unit, backend):
    spans = BY_GROUP if unit == "groups" else SPANS + BY_GROUP
    many = 40 if interpreted(backend) else 300
    for sequences, span, per_token in itertools.product((0, 1, 3, many), spans, (True, False)):
        args, found = weights_of(backend, sequences, span, unit, per_token)
        for x, expected in zip(found, reference.aggregation_weights(*args), strict=True):
            assert torch.equal(x, expected) and x.dtype == expected.dtype == torch.float64


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("unit", UNITS)
def test_opcheck_of_each_unit(unit, backend):
    args, _ = weights_of(backend, 3, "group", unit, True)
    torch.library.opcheck(backends.BACKENDS[backend].ops.aggregation_weights.default, args)


NORMALIZERS = {
    "token-mean": lambda width: {},
    "token-sum": lambda width: {},
    "seq-mean-token-sum-norm": lambda width: {},
    "a number": lambda width: {"normalizer": 1.5 * width},
    "a tensor": lambda width: {"normalizer": torch.tensor(1.5 * width)},
}


@pytest.mark.parametrize(
    "normalizer, backend",
    [("token-mean", "reference"), *((kind, KERNELS[0]) for kind in NORMALIZERS)],
)
def test_a_length_is_not_burnt_into_a_graph(normalizer, backend):
    device = device_of(backend)
    aggregation = normalizer if normalizer in AGGREGATIONS else None

    def loss(logp, old_logp, advantages, **options):
        options |= {"aggregation": aggregation, "backend": backend}
        return tokenrl.policy_loss("grpo", logp, old_logp, advantages, **options)[0]

    compiled, graphs = counted(loss)
    for width in (5, 7, 16, 23):
        g = torch.Generator().manual_seed(width)
        logp, old = (torch.randn(3, width, generator=g).to(device) for _ in range(2))
        values = []
        for function in (loss, compiled):
            leaf = logp.clone().requires_grad_()
            value = function(leaf, old, old[:, 0].clone(), **NORMALIZERS[normalizer](width))
            values.append((value.detach(), *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*values, rtol=0, atol=0)
    assert 1 <= len(graphs) <= 2
