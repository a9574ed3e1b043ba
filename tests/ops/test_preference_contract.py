"""The contract of the ops of preferences: opcheck, gradcheck, torch.compile, refusals."""

import functools

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends, on_backends
from preference_cases import P, T, batch

import tokenrl
from tokenrl.ops import backends
from tokenrl.ops.preference_ops import PreferenceOpInputs

KERNELS = kernel_backends()
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
EVERY = (*STATIC, "test_aot_dispatch_dynamic")
TRAINED = ("logp", "divergence", "token_weight", "divergence_weight")


def arguments(name, backend, everything):
    """Of op preference for a row of the table; everything: what it may be given."""
    case = {key: x.flatten() for key, x in batch(name, dtype=torch.float32).items()}
    row, g = tokenrl.PREFERENCES[name], torch.Generator().manual_seed(1)
    cu_seqlens = torch.arange(2 * P + 1) * T
    if everything:
        case |= {"token_weight": torch.rand(2 * P * T, generator=g), "nll_mask": case["mask"].roll(1)}
        case |= {"pairs": torch.tensor([[0, 3], [4, 1]]), "pair_weight": torch.rand(2, generator=g).double()}
        case |= {key: torch.tensor(3.0, dtype=torch.float64) for key in ("normalizer", "nll_normalizer")}
        if row.divergence:
            case["divergence_weight"] = torch.rand(2 * P * T, generator=g)
    given = {key: None if x is None else x.to(device_of(backend)) for key, x in case.items()}
    for key in TRAINED:
        if given.get(key) is not None:
            given[key].requires_grad_()
    base = (
        torch.tensor(0.1, dtype=torch.float64, device=device_of(backend)) if given.pop("kl", None) is not None else None
    )
    absent = dict.fromkeys((*TRAINED, "ref_logp", "pairs", "desirable", "pair_weight", "normalizer", "nll_mask",
                            "nll_normalizer"))  # fmt: skip
    return PreferenceOpInputs(
        **absent | given, cu_seqlens=cu_seqlens.to(device_of(backend)), base=base, link=row.link.name,
        link_params=row.link.params(), score=row.score.name, score_params=row.score.params(), statistic=row.statistic,
        coupling=row.coupling, divergence_factor=float(row.divergence), divergence_flow=row.divergence_flow,
        length=float(row.length), nll=1.0 if everything else float(row.nll),
    )  # fmt: skip


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name,everything", [("tdpo2", True), ("aot", False), ("kto", False)])
def test_opcheck(name, everything, backend):
    given, ops = arguments(name, backend, everything), backends.BACKENDS[backend].ops
    labelled = given.desirable is not None  # NaN, of which opcheck says that it is not itself
    torch.library.opcheck(ops.preference.default, tuple(given), test_utils=STATIC if labelled else EVERY)
    grad = given.logp.detach()[0].clone()
    slopes = torch.rand(3, 2 * P, dtype=torch.float64, device=grad.device)
    tokens = [getattr(given, key) for key in (*TRAINED, "ref_logp", "mask", "cu_seqlens", "nll_mask")]
    tokens = [x.detach() if isinstance(x, torch.Tensor) else x for x in tokens]
    for wanted in ([x is not None for x in tokens[:4]], [True, False, False, False]):
        torch.library.opcheck(ops.preference_backward.default, (grad, slopes, *tokens, everything, wanted))


# The interpreter takes a minute for a row; test_preference_kernels.py holds its gradients to the reference's.
@on_backends(["dpo_js", "tdpo1", "aot", "kto", "orpo", "simpo"], [b for b in backends_to_test() if not interpreted(b)])
def test_gradcheck(name, backend):
    """With respect to the log-probs and whatever else is trained, in fp64."""
    case = {key: x[:, 1:4] if x.dim() == 2 else x for key, x in batch(name).items()}
    case = {key: x.to(device_of(backend)) for key, x in case.items()}
    g = torch.Generator().manual_seed(5)
    row = tokenrl.PREFERENCES[name]
    trained = ("logp", "divergence") if row.divergence_flow == "both" else ("logp",)
    leaves = {key: case.pop(key).requires_grad_() for key in trained if key in case}
    if row.coupling != "sorted_margins" or backend == "reference":
        weight = torch.rand(2 * P, 3, dtype=torch.float64, generator=g) + 0.5
        leaves["token_weight"] = weight.to(device_of(backend)).requires_grad_()

    def loss(*given):
        return tokenrl.preference_loss(name, **case, **dict(zip(leaves, given, strict=True)), backend=backend)[0]

    # The backward of the reference is torch's, which promises no bits.
    gradcheck = functools.partial(torch.autograd.gradcheck, nondet_tol=1e-12 if backend == "reference" else 0.0)
    assert gradcheck(loss, list(leaves.values()))


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", ["tdpo2", "orpo"])
def test_compiles_into_one_graph(name, backend):
    case = {key: x.to(device_of(backend)) for key, x in batch(name).items()}
    logp = case.pop("logp").requires_grad_()

    def loss(x):
        value, metrics = tokenrl.preference_loss(name, x, **case, backend=backend)
        return value, metrics.margins

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (eager, margins), (traced, found) = loss(logp), compiled(logp)
    torch.testing.assert_close([traced, found], [eager, margins])
    grads = [torch.autograd.grad(value, logp)[0] for value in (traced, eager)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_second_derivative_raises(backend):
    case = {key: x.to(device_of(backend)) for key, x in batch("dpo").items()}
    logp = case.pop("logp").requires_grad_()
    loss = tokenrl.preference_loss("dpo", logp, **case, backend=backend)[0]
    (grad,) = torch.autograd.grad(loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="preference: differentiated twice, accepted: once"):
        torch.autograd.grad(grad.square().sum(), logp)


@pytest.mark.parametrize("backend", KERNELS)
def test_what_has_no_kernel_is_named(backend):
    """A weight that is trained where the reference's sums are sorted too; a call that names no backend may have it."""
    case = {key: x.to(device_of(backend)) for key, x in batch("aot").items()}
    weight = torch.ones_like(case["logp"], requires_grad=True)
    with pytest.raises(RuntimeError, match="it has no kernel of the gradient of token_weight in objective 'aot'"):
        tokenrl.preference_loss("aot", **case, token_weight=weight, backend=backend)
    grads = [
        torch.autograd.grad(tokenrl.preference_loss("aot", **case, token_weight=weight, backend=b)[0], weight)[0]
        for b in (None, "reference")
    ]
    assert grads[0].any() and torch.equal(*grads)
    loss = tokenrl.preference_loss("aot", **case, token_weight=weight.detach(), backend=backend)[0]
    torch.testing.assert_close(loss, tokenrl.preference_loss("aot", **case, backend="reference")[0])
