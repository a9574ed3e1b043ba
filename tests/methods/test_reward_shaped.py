"""reward_shaped_nll: the gradient of the expected reward over the whole vocabulary, from hidden states, errors."""

import pytest
import torch

import tokenrl
from tokenrl import linear_reward_shaped_nll, reward_shaped_nll

N, V, D, K = 12, 17, 5, 4
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, BIAS = (torch.randn(*s, generator=G, dtype=torch.float64) for s in ((N, D), (V, D), (V,)))
LOGITS = HIDDEN @ WEIGHT.t() + BIAS
IDS = torch.randint(0, V, (N,), generator=G)
IDS[:3] = LOGITS[:3].argmax(-1)
MASK = torch.arange(N) != 4
WAYS = {
    "precision": {},
    "diversity": {"beta": 0.5},
    "the other reading": {"reading": "power"},
    "tail": {"lam_tail": -0.1},
    "top and tail": {"lam_top": 0.1, "lam_tail": -0.2, "beta": 0.5, "reading": "power"},
}


def gradient_by_hand(z, y, beta=-0.25, lam_top=0.0, lam_tail=0.0, reading="focal"):
    """-p_v (R_v - sum p R), in a loop over the vocabulary."""
    p = z.softmax(-1)
    top = sorted(range(V), key=lambda v: (-z[v].item(), v))[:K]
    reward = torch.tensor([lam_top if v in top else lam_tail for v in range(V)], dtype=torch.float64)
    power = (1 - p[y]) ** beta
    reward[y] = power / p[y] if reading == "focal" else (1 / p[y]) ** power
    return -p * (reward - (p * reward).sum())


@pytest.mark.parametrize("name", WAYS)
def test_the_gradient_is_exact(name):
    logits = LOGITS.clone().requires_grad_()
    spoiled = torch.where(MASK[:, None], logits, torch.nan)
    values = reward_shaped_nll(spoiled, IDS, k=K, row_mask=MASK, **WAYS[name])
    (found,) = torch.autograd.grad(values.sum(), logits)
    expected = torch.stack([gradient_by_hand(z, y, **WAYS[name]) for z, y in zip(LOGITS, IDS, strict=True)])
    torch.testing.assert_close(found, torch.where(MASK[:, None], expected, 0))
    assert values[4] == 0 and values[MASK].all()
    hidden, weight, bias = (x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS))
    linear = linear_reward_shaped_nll(hidden, weight, IDS, bias=bias, k=K, row_mask=MASK, **WAYS[name])
    torch.testing.assert_close(linear, values)
    grads = torch.autograd.grad(linear.sum(), (hidden, weight, bias))
    for got, wanted in zip(grads, (found @ WEIGHT, found.t() @ HIDDEN, found.sum(0)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("reading", ["focal", "power"])
def test_beta_zero_is_cross_entropy(reading):
    logits = LOGITS.clone().requires_grad_()
    found = reward_shaped_nll(logits, IDS, beta=0.0, reading=reading)
    expected = torch.nn.functional.cross_entropy(logits, IDS, reduction="none")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected)))


def test_values_and_batches():
    """The value as it is told, of [B, T], with a temperature, ignored ids, in fp32 of bf16 logits."""
    logits, ids = LOGITS.view(3, 4, V), IDS.view(3, 4).clone()
    ids[1, 1] = -100
    values = reward_shaped_nll(logits, ids, lam_top=0.3, lam_tail=-0.1, k=K, temperature=0.5)
    p = (2 * logits).softmax(-1)
    own = p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    listed = p.sort(-1, descending=True).values[..., :K]
    among = own >= listed[..., -1]
    top = listed.sum(-1) - torch.where(among, own, 0)
    expected = -((1 - own) ** -0.25) * own.log() - 0.3 * top + 0.1 * (1 - top - own)
    torch.testing.assert_close(values, torch.where(ids == -100, 0, expected))
    assert reward_shaped_nll(LOGITS.bfloat16(), IDS).dtype == torch.float32
    assert reward_shaped_nll(LOGITS[:0], IDS[:0], lam_top=0.1, k=K).shape == (0,)
    loss = tokenrl.group_aggregate(values, "token-mean", mask=ids != -100)
    torch.testing.assert_close(loss, expected[ids != -100].mean())


def test_certain_tokens_and_impossible_ones():
    """1 - p is at least the floor, and where p underflows the gradient is that of cross entropy."""
    logits = torch.tensor([[900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], requires_grad=True)
    for reading in ("focal", "power"):
        values = reward_shaped_nll(logits, torch.tensor([0, 0]), lam_tail=-0.1, k=1, reading=reading)
        (grad,) = torch.autograd.grad(values.sum(), logits)
        assert values.isfinite().all() and grad.isfinite().all()
        assert grad[0].abs().max() < 1e-6 and grad[1, 0] == pytest.approx(-1)


ERRORS = {
    "reading": ({"reading": "a"}, "reading: got 'a', accepted: focal, power"),
    "k": ({"k": 0, "lam_top": 1}, "k: got 0, accepted: an integer from 1 to 17, the vocabulary"),
    "floor": ({"floor": 0}, "floor: got 0, accepted: a number above 0, at most 1"),
    "beta": ({"beta": None}, "beta: got None"),
    "ids": ({"ids": IDS[1:]}, r"ids: got shape \[11\], accepted: one id per row"),
    "several": ({"ids": IDS[:, None]}, r"ids: got shape \[12, 1\], accepted: one id per row"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        reward_shaped_nll(**{"logits": LOGITS, "ids": IDS} | changes)
    changes = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS} | changes
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_reward_shaped_nll(**changes)


def test_a_list_sees_no_keep_mask():
    keep = torch.arange(V) > 0
    kept = linear_reward_shaped_nll(HIDDEN, WEIGHT, IDS.clamp(min=1), beta=0.0, keep_mask=keep)
    expected = torch.nn.functional.cross_entropy((HIDDEN @ WEIGHT.t())[:, 1:], IDS.clamp(min=1) - 1, reduction="none")
    torch.testing.assert_close(kept, expected)
    with pytest.raises(ValueError, match="^keep_mask: got one, accepted: None beside lam_top or lam_tail"):
        linear_reward_shaped_nll(HIDDEN, WEIGHT, IDS, k=K, lam_top=0.1, keep_mask=keep)


def test_a_row_without_an_id_may_hold_anything():
    """Neither the gradient of the others nor its own sees the list of its logits."""
    ids, spoiled = torch.where(MASK, IDS, -100), torch.where(MASK[:, None], HIDDEN, torch.nan)
    leaves = [x.clone().requires_grad_() for x in (spoiled, WEIGHT)]
    expected = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
    values = linear_reward_shaped_nll(leaves[0], leaves[1], ids, k=K, lam_top=0.1, lam_tail=-0.2)
    truth = reward_shaped_nll(expected[0] @ expected[1].t(), IDS, k=K, lam_top=0.1, lam_tail=-0.2, row_mask=MASK)
    torch.testing.assert_close(values, truth)
    grads = (torch.autograd.grad(x.sum(), y) for x, y in ((values, leaves), (truth, expected)))
    torch.testing.assert_close(*grads)
