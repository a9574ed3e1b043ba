"""Losses of sequences and of groups: typed out in floats and loops with their gradients; layouts, dtypes and parts."""

import math

import pytest
import torch

from tokenrl import group_losses as losses

VALID = torch.zeros(6, 6, dtype=torch.bool)
for row, columns in enumerate(((0, 1, 3, 4), range(6), (), (1, 2, 4, 5), (0, 2), (3, 5))):
    VALID[row, list(columns)] = True
ENDS = torch.cat([torch.zeros(1, dtype=torch.int64), VALID.sum(1).cumsum(0)])
IDS = torch.tensor([4, -1, 4, 4, -1, 8])  # the second row of group 4 has no token, group 8 is of one
ROWS = [i for i in range(6) if VALID[i].any()]
NAMES = ("target_po", "gvpo", "sppo", "a_star_po", "flowrl")
DRAW = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


LOGP = -draw(6, 6).abs()
GIVEN = {
    "old_logp": LOGP - 0.4 * draw(6, 6), "ref_logp": LOGP - 0.7 * draw(6, 6), "score": draw(6), "log_z": draw(6),
    "logp": LOGP,
}  # fmt: skip
GIVEN["old_logp"][1, 2] -= 4  # FlowRL's weight is at its ceiling


def called(name, logp, given=GIVEN, **more):
    """more: mask or cu_seqlens, parameters."""
    old, ref, score, log_z = (given[key] for key in ("old_logp", "ref_logp", "score", "log_z"))
    arguments = {
        "target_po": (old, score, IDS), "gvpo": (old, score, IDS), "sppo": (old, score), "a_star_po": (ref, score),
        "flowrl": (old, ref, score, log_z),
    }[name]  # fmt: skip
    return getattr(losses, f"{name}_loss")(logp, *arguments, **more)


def groups():
    return [[i for i in ROWS if IDS[i] == g] for g in (4, -1, 8)]


def total(x, i):
    return math.fsum(x[i, j].item() for j in range(6) if VALID[i, j])


def softmax(x):
    weights = [math.exp(y - max(x)) for y in x]
    return [w / sum(weights) for w in weights]


def target_po(eta):
    loss, slopes = 0.0, {}
    for rows in groups():
        scores = [GIVEN["score"][i].item() for i in rows]
        mean = sum(scores) / len(rows)
        std = math.sqrt(sum((x - mean) ** 2 for x in scores) / len(rows)) or 1.0
        old, now = ([total(GIVEN[name], i) for i in rows] for name in ("old_logp", "logp"))
        q, p = softmax([s + (x - mean) / std / eta for s, x in zip(old, scores, strict=True)]), softmax(now)
        loss -= sum(a * math.log(b) for a, b in zip(q, p, strict=True)) / 3
        slopes |= {i: (b - a) / 3 for i, a, b in zip(rows, q, p, strict=True)}
    return loss, slopes


def gvpo(beta):
    loss, slopes = 0.0, {}
    for rows in groups():
        rewards = [beta * (total(LOGP, i) - total(GIVEN["old_logp"], i)) for i in rows]
        for i, reward in zip(rows, rewards, strict=True):
            error, over = reward - sum(rewards) / len(rows) - GIVEN["score"][i].item(), max(len(rows) - 1, 1) * 3
            loss += error**2 / 2 / over
            slopes[i] = beta * error / over
    return loss, slopes


def squares(base, beta, eta):
    loss, slopes = 0.0, {}
    for i in ROWS:
        error = beta * (total(LOGP, i) - total(GIVEN[base], i)) - eta * GIVEN["score"][i].item()
        loss, slopes[i] = loss + error**2 / 5, 2 * beta * error / 5
    return loss, slopes


def flowrl(beta, ceiling):
    loss, slopes = 0.0, {}
    for i in ROWS:
        n, score, log_z = VALID[i].sum().item(), GIVEN["score"][i].item(), GIVEN["log_z"][i].item()
        error = log_z + (total(LOGP, i) - total(GIVEN["ref_logp"], i)) / n - beta * score
        w = min(math.exp(total(LOGP, i) - total(GIVEN["old_logp"], i)), ceiling)
        loss, slopes[i] = loss + w * error**2 / 5, 2 * w * error / n / 5
    return loss, slopes


FORMULAS = [
    ("target_po", {}, target_po(1.0)), ("target_po", {"eta": 0.3}, target_po(0.3)), ("gvpo", {}, gvpo(0.1)),
    ("gvpo", {"beta": 0.7}, gvpo(0.7)), ("sppo", {}, squares("old_logp", 1.0, 1.0)),
    ("sppo", {"eta": 2.5}, squares("old_logp", 1.0, 2.5)), ("a_star_po", {}, squares("ref_logp", 1e-3, 1.0)),
    ("a_star_po", {"beta": 0.4}, squares("ref_logp", 0.4, 1.0)), ("flowrl", {}, flowrl(15.0, 10.0)),
    ("flowrl", {"beta": 2.0, "ceiling": 0.5}, flowrl(2.0, 0.5)),
]  # fmt: skip


def with_gradient(name, logp, **more):
    leaf = logp.clone().requires_grad_()
    loss = called(name, leaf, **more)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name,parameters,expected", FORMULAS, ids=range(len(FORMULAS)))
def test_formula(name, parameters, expected):
    loss, gradient = with_gradient(name, LOGP, mask=VALID, **parameters)
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    slopes = torch.tensor([expected[1].get(i, 0.0) for i in range(6)], dtype=torch.float64)[:, None] * VALID
    torch.testing.assert_close(gradient, slopes, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name):
    """Twice; of GVPO the mean is stopped, and FlowRL's weight is a number above its ceiling."""
    more = {"ceiling": 0.01} if name == "flowrl" else {}
    leaves = LOGP.clone().requires_grad_(), GIVEN["log_z"].clone().requires_grad_()

    def loss(logp, log_z):
        return called(name, logp, GIVEN | {"log_z": log_z}, mask=VALID, **more)

    if name == "gvpo":
        (first,) = torch.autograd.grad(loss(*leaves), leaves[:1], create_graph=True)
        second = torch.autograd.grad(first.sum(), leaves[0])[0]
        size = {i: len(rows) for rows in groups() for i in rows}
        over = [3 * max(size.get(i, 0) - 1, 1) for i in range(6)]
        expected = 0.01 * VALID.sum(1).double() / torch.tensor(over)
        torch.testing.assert_close(second, expected[:, None] * VALID, rtol=1e-12, atol=0)
    else:
        assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_garbage_dtypes_and_parts(name):
    expected = with_gradient(name, LOGP, mask=VALID)
    tokens = [key for key, x in GIVEN.items() if x.dim() == 2]
    spoiled = {key: torch.where(VALID if key in tokens else VALID.any(1), x, math.nan) for key, x in GIVEN.items()}
    found = with_gradient(name, spoiled["logp"], given=spoiled, mask=VALID)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    flat = {key: x[VALID] if key in tokens else x for key, x in GIVEN.items()}
    packed = with_gradient(name, flat["logp"], given=flat, cu_seqlens=ENDS)
    torch.testing.assert_close(packed[0], expected[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(packed[1], expected[1][VALID], rtol=1e-14, atol=1e-16)
    single = {key: x.float() for key, x in GIVEN.items()}
    loss, gradient = with_gradient(name, single["logp"], given=single, mask=VALID)
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-4, atol=1e-5)
    count = 3 if name in ("target_po", "gvpo") else 5
    halves = [VALID & (IDS == 4)[:, None], VALID & (IDS != 4)[:, None]]
    for normalizer in (count, torch.tensor(count)):
        parts = [with_gradient(name, LOGP, mask=half, normalizer=normalizer) for half in halves]
        for x, whole in zip(zip(*parts, strict=True), expected, strict=True):
            torch.testing.assert_close(sum(x), whole, rtol=1e-13, atol=1e-16)
    nothing = with_gradient(name, LOGP, mask=VALID & False)
    assert nothing[0] == 0 and not nothing[1].any()


def test_scores_without_variance():
    """q is the old policy's: the loss pulls back to it."""
    alike = GIVEN | {"score": torch.full((6,), 0.1, dtype=torch.float64), "old_logp": LOGP}
    assert with_gradient("target_po", LOGP, given=alike, mask=VALID)[1].abs().max() < 1e-16


ERRORS = [
    (lambda: called("sppo", LOGP.bfloat16(), mask=VALID), "logp: got dtype torch.bfloat16"),
    (lambda: called("gvpo", LOGP, mask=VALID, normalizer=0), "normalizer: got 0, accepted: a number above 0"),
    (lambda: called("gvpo", LOGP, GIVEN | {"score": draw(5)}, mask=VALID), r"advantages: got shape \[5\]"),
    (lambda: called("target_po", LOGP, GIVEN | {"score": LOGP}, mask=VALID), r"scores: got shape \[6, 6\]"),
    (lambda: called("a_star_po", LOGP, GIVEN | {"ref_logp": LOGP[:2]}, mask=VALID), r"ref_logp: got shape \[2, 6\]"),
    (lambda: called("sppo", LOGP, GIVEN | {"old_logp": LOGP.clone().requires_grad_()}, mask=VALID), "old_logp: got a "),
    (lambda: called("flowrl", LOGP, GIVEN | {"log_z": draw(6, 1)}, mask=VALID), r"log_z: got shape \[6, 1\]"),
    (lambda: losses.gvpo_loss(LOGP, LOGP, draw(6), IDS[:2], mask=VALID), r"group_ids: got \[2\]"),
]


@pytest.mark.parametrize("call,message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
