"""unlearning_loss and smoothing_kl: every row by hand, value and gradient; layouts, second derivatives, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import logsigmoid

import tokenrl
from tokenrl.objectives.unlearning import UNLEARNINGS

B, T, V, D = 4, 6, 7, 3


def batch():
    """logp, ref_logp, divergence, masks: sequence 3 has nothing to forget, sequence 2 nothing to retain."""
    g = torch.Generator().manual_seed(0)
    logp, ref_logp = -2 * torch.rand(2, B, T, generator=g, dtype=torch.float64)
    kinds = torch.randint(0, 3, (B, T), generator=g)
    kinds[3][kinds[3] == 2], kinds[2][kinds[2] == 1] = 1, 2
    eos = torch.zeros(B, T, dtype=torch.bool)
    eos[:, -1] = True
    kinds[0, -1], kinds[1, -1] = 1, 2
    return logp, ref_logp, torch.rand(B, T, generator=g, dtype=torch.float64), kinds, eos


LOGP, REF, DIVERGENCE, KINDS, EOS = batch()
FORGET, RETAIN = KINDS == 2, KINDS == 1
assert FORGET.any(1).tolist() == [True, True, True, False] and (EOS & RETAIN).sum() not in (0, 4)


def arguments(name, logp, divergence, change=lambda x: x):
    row, given = UNLEARNINGS[name], {"forget_mask": change(FORGET)}
    given |= {"retain_mask": change(RETAIN)} if row.retain else {}
    given |= {"eos_mask": change(EOS)} if row.eos else {}
    given |= {"divergence": change(divergence)} if row.smoothing else {}
    return {"logp": change(logp), "ref_logp": change(REF) if row.reference == "given" else None} | given


def of_sequences(x, mean=False):
    return torch.stack([x[i][FORGET[i]].mean() if mean else x[i][FORGET[i]].sum() for i in range(B) if FORGET[i].any()])


BY_HAND = {
    "ga": lambda lp: lp[FORGET].mean(),
    "grad_diff": lambda lp: lp[FORGET].mean() - lp[RETAIN].mean(),
    "unlikelihood": lambda lp: -(1 - lp[FORGET].exp()).log().mean() - lp[RETAIN].mean(),
    "npo": lambda lp: -2 / 0.1 * logsigmoid(-0.1 * of_sequences(lp - REF)).mean(),
    "simnpo": lambda lp: -2 / 2.5 * logsigmoid(-2.5 * of_sequences(lp, mean=True)).mean(),
    "au": lambda lp: (
        -5 * lp[RETAIN].mean()
        - lp[EOS & RETAIN].mean()
        + 0.5 * (0.7 * (1 + (0.1 * lp[FORGET]).exp()).log().mean() + 0.3 * DIVERGENCE[FORGET].mean())
    ),
    "au_ga": lambda lp: -5 * lp[RETAIN].mean() - lp[EOS & RETAIN].mean() + 0.5 * lp[FORGET].mean(),
}


@pytest.mark.parametrize("name", UNLEARNINGS)
def test_rows_by_hand(name):
    logp, divergence = LOGP.clone().requires_grad_(), DIVERGENCE.clone().requires_grad_()
    expected = BY_HAND[name](logp)
    (truth,) = torch.autograd.grad(expected, logp)
    kept = KINDS > 0
    spoiled = torch.where(kept, logp, torch.nan), torch.where(FORGET, divergence, torch.nan)
    loss, parts = tokenrl.unlearning_loss(name, **arguments(name, *spoiled))
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    packed = arguments(name, logp, divergence, lambda x: x[kept])
    packed, packed_parts = tokenrl.unlearning_loss(name, **packed, cu_seqlens=boundaries)
    for found in (loss, packed):
        torch.testing.assert_close(found, expected)
        wanted = [logp, divergence] if UNLEARNINGS[name].smoothing else [logp]
        found, *more = torch.autograd.grad(found, wanted)
        torch.testing.assert_close(found, truth)
        assert found.any() and not found[~kept].any()
        for of_divergence in more:
            torch.testing.assert_close(of_divergence, FORGET.double() * 0.5 * 0.3 / FORGET.sum())
    torch.testing.assert_close(parts, packed_parts)
    assert not parts.forget.requires_grad
    single, _ = tokenrl.unlearning_loss(name, **arguments(name, LOGP.float(), DIVERGENCE.float(), _as_float))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-6, atol=1e-6)


def _as_float(x):
    return x.float() if x.is_floating_point() else x


@pytest.mark.parametrize("name", UNLEARNINGS)
def test_no_number_is_read(name):
    """Fake tensors have none: whatever waits for a device raises."""
    with FakeTensorMode() as mode:
        logp = mode.from_tensor(LOGP).requires_grad_()
        loss, _ = tokenrl.unlearning_loss(name, **arguments(name, LOGP, DIVERGENCE, mode.from_tensor) | {"logp": logp})
        assert loss.shape == () and torch.autograd.grad(loss, logp)[0].shape == (B, T)


def test_the_gradients_of_the_papers():
    """Typed: unlikelihood p / (1 - p), AU alpha beta sigma(beta lp), NPO 2 sigma(beta D), SimNPO by length."""
    p, n = LOGP.exp(), FORGET.sum()
    score, length = torch.where(FORGET, LOGP - REF, 0).sum(1, keepdim=True), FORGET.sum(1, keepdim=True)
    mean = torch.where(FORGET, LOGP, 0).sum(1, keepdim=True) / length.clamp(min=1)
    sequences = (length > 0).sum()
    expected = {
        "ga": torch.ones_like(p) / n, "unlikelihood": p / (1 - p) / n,
        "au": 0.5 * 0.7 * 0.1 * (0.1 * LOGP).sigmoid() / n, "npo": 2 * (0.1 * score).sigmoid() / sequences,
        "simnpo": 2 * (2.5 * mean).sigmoid() / length / sequences,
    }  # fmt: skip
    for name, truth in expected.items():
        logp = LOGP.clone().requires_grad_()
        (found,) = torch.autograd.grad(tokenrl.unlearning_loss(name, **arguments(name, logp, DIVERGENCE))[0], logp)
        torch.testing.assert_close(found[FORGET], truth.expand(B, T)[FORGET])


@pytest.mark.parametrize("name", UNLEARNINGS)
def test_derivatives(name):
    """First and second, of every number that gets a gradient."""
    logp, divergence = LOGP[:, :3].clone().requires_grad_(), DIVERGENCE[:, :3].clone().requires_grad_()

    def call(logp, divergence):
        given = arguments(name, LOGP, DIVERGENCE, lambda x: x[:, :3])
        given |= {"logp": logp} | ({"divergence": divergence} if "divergence" in given else {})
        return tokenrl.unlearning_loss(name, **given)[0]

    assert torch.autograd.gradcheck(call, (logp, divergence))
    assert torch.autograd.gradgradcheck(call, (logp, divergence))


def test_changed_rows():
    how = {"forget_mask": FORGET, "retain_mask": RETAIN}
    free = tokenrl.unlearning("npo", reference="none", beta=0.3, retain=2.0)
    loss, parts = tokenrl.unlearning_loss(free, LOGP, **how)
    expected = -2 / 0.3 * logsigmoid(-0.3 * of_sequences(LOGP)).mean() - 2 * LOGP[RETAIN].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, parts.forget + 2 * parts.retain)
    shifted = tokenrl.unlearning("simnpo", gamma=0.5)
    loss, _ = tokenrl.unlearning_loss(shifted, LOGP, forget_mask=FORGET)
    torch.testing.assert_close(loss, -2 / 2.5 * logsigmoid(-2.5 * of_sequences(LOGP, mean=True) - 0.5).mean())
    loss, _ = tokenrl.unlearning_loss(tokenrl.unlearning("npo", statistic="token"), LOGP, REF, forget_mask=FORGET)
    torch.testing.assert_close(loss, -2 / 0.1 * logsigmoid(-0.1 * (LOGP - REF)[FORGET]).mean())
    halves = (
        tokenrl.unlearning_loss(
            "grad_diff", LOGP[at], **{key: x[at] for key, x in how.items()}, normalizer=FORGET.sum(),
            retain_normalizer=int(RETAIN.sum()),
        )[0]
        for at in (slice(2), slice(2, 4))
    )  # fmt: skip
    torch.testing.assert_close(sum(halves), BY_HAND["grad_diff"](LOGP))


def test_certain_tokens_nothing_to_forget_and_empty_batches():
    logp = torch.tensor([[0.0, -1e-7, -800.0]], dtype=torch.float64, requires_grad=True)
    forget = torch.tensor([[True, True, True]])
    loss, _ = tokenrl.unlearning_loss(tokenrl.unlearning("unlikelihood", retain=0.0), logp, forget_mask=forget)
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite() and grad.tolist() == [[0, 0, 0]]  # below the floor, and of no probability
    for name in UNLEARNINGS:
        logp = LOGP.clone().requires_grad_()
        given = arguments(name, logp, DIVERGENCE) | {"forget_mask": torch.zeros_like(FORGET)}
        loss, parts = tokenrl.unlearning_loss(name, **given)
        assert parts.forget == 0 and torch.autograd.grad(loss, logp)[0].isfinite().all()
    none = torch.zeros(0, 5, dtype=torch.float64)
    assert tokenrl.unlearning_loss("ga", none, forget_mask=none.bool())[0] == 0


@pytest.mark.parametrize("target", ["detached", "attached"])
def test_smoothing(target):
    """P - q, and both ways as the formula has it; masked rows and the same from hidden states."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((B, T, D), (V, D)))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    found = tokenrl.smoothing_kl(logits, tempered=2.0, target=target, temperature=0.7, row_mask=FORGET)
    z = logits.detach() / 0.7
    log_p, log_q = z.log_softmax(-1), (z / 2).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl = (q * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(found, torch.where(FORGET, kl, 0))
    (grad,) = torch.autograd.grad(found.sum(), logits)
    slope = p - q + (q * (log_q - log_p - kl[..., None]) / 2 if target == "attached" else 0)
    torch.testing.assert_close(grad, torch.where(FORGET[..., None], slope / 0.7, 0))
    if target == "detached":
        loss = tokenrl.linear_smoothing_kl(hidden, weight, temperature=0.7, row_mask=FORGET)
        torch.testing.assert_close(loss, found)
        wanted = torch.autograd.grad((hidden @ weight.t()), (hidden, weight), grad)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), (hidden, weight)), wanted)


def test_a_loss_without_any_term_has_a_gradient_of_zeros():
    """As a schedule of coefficients may begin."""
    leaf = LOGP.clone().requires_grad_()
    loss, parts = tokenrl.unlearning_loss(tokenrl.unlearning("ga", forget=0), leaf, forget_mask=FORGET)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and loss.dtype == LOGP.dtype and parts.forget != 0 and not grad.any()


ERRORS = {
    "objective": ({"objective": "gaa"}, "objective: got 'gaa', accepted: ga, .* Did you mean"),
    "reference": ({"objective": "npo"}, "ref_logp: got None, accepted: one; objective 'npo' needs it"),
    "no reference": ({"ref_logp": REF}, "ref_logp: got one, accepted: None; objective 'ga' has no use for it"),
    "retain": ({"objective": "grad_diff"}, "retain_mask: got None, accepted: one; objective 'grad_diff' needs it"),
    "both": ({"retain_mask": FORGET}, "retain_mask: got tokens of forget_mask, accepted: tokens to retain alone"),
    "kinds": ({"forget_mask": KINDS}, "forget_mask: got dtype torch.int64, accepted: torch.bool"),
    "eos": ({"eos_mask": EOS[1:], "retain_mask": RETAIN}, r"eos_mask: got shape \[3, 6\], accepted: one value per"),
    "dtype": ({"logp": LOGP.bfloat16()}, "logp: got dtype torch.bfloat16"),
    "divergence": ({"divergence": DIVERGENCE}, "divergence: got one, accepted: None; objective 'ga' has no use"),
    "normalizer": ({"normalizer": 0}, "normalizer: got 0, accepted: a number above 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.unlearning_loss(**{"objective": "ga", "logp": LOGP, "forget_mask": FORGET} | changes)


def test_errors_of_a_row():
    for changes, message in (
        ({"bta": 0.1}, "parameter of 'npo': got 'bta', .* Did you mean 'beta'"),
        ({"beta": 0}, "beta: got 0, accepted: a number above 0"),
        ({"statistic": "max"}, "statistic: got 'max', accepted: token, sum, mean"),
        ({"smoothing": 0.1}, "smoothing: got 0.1, accepted: 0 where the forget term is of sequences"),
        ({"retain": -1}, "retain: got -1, accepted: a number, at least 0"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            tokenrl.unlearning("npo", **changes)
    for given in (
        lambda: tokenrl.smoothing_kl([0.0]), lambda: tokenrl.linear_smoothing_kl(torch.zeros(2, 3), [0.0]),
        lambda: tokenrl.smoothing_kl(torch.zeros(2, 3), temperature="1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^(logits: got a list|weight: got a list|temperature: got '1')"):
            given()
    with pytest.raises(ValueError, match="^target: got 'free', accepted: detached, attached"):
        tokenrl.smoothing_kl(torch.randn(2, 3), target="free")
