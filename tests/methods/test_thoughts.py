"""thoughts: Quiet-STaR's rewards in loops and its loss, CoT2's ratio and soft labels, errors."""

import pytest
import torch

import tokenrl
from tokenrl import thoughts

B, T, J, V, K = 4, 6, 3, 9, 3
G = torch.Generator().manual_seed(0)
MASK = torch.rand(B, T, generator=G) > 0.25
BASE, AFTER = -torch.rand(B, T, generator=G).double(), -torch.rand(B, T, J, generator=G).double()


def by_hand(passes, worse):
    reward = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for t in range(T):
            for j in range(J):
                if t + j < T and MASK[i, t] and MASK[i, t + j]:
                    reward[i, t] += AFTER[i, t, j] - BASE[i, t + j]
    for first in range(0, B, passes):
        rows = reward[first : first + passes].clone()
        reward[first : first + passes] -= rows.mean(0) if passes > 1 else 0
    return torch.where(MASK, reward.clamp(min=0) if worse == "zero" else reward, 0)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("worse", ["zero", "keep"])
def test_rewards_in_loops(worse, passes):
    base, after = torch.where(MASK, BASE, torch.nan), AFTER.clone()
    after[~MASK] = torch.nan
    after[:, T - 1, 1:] = torch.nan  # past the end
    found = thoughts.thought_rewards(after, base, passes=passes, worse=worse, mask=MASK)
    expected = by_hand(passes, worse)
    torch.testing.assert_close(found, expected)
    assert (expected > 0).any() and (expected < 0).any() == (worse == "keep")
    if passes == 1:
        flat = after.flatten(0, 1), base.flatten()
        boundaries = torch.arange(0, B * T + 1, T)
        packed = thoughts.thought_rewards(*flat, worse=worse, mask=MASK.flatten(), cu_seqlens=boundaries)
        torch.testing.assert_close(packed, expected.flatten())


def test_quiet_stars_loss():
    """The authors' line, of two thought tokens at each place: -mean(R log softmax(z / 3)), the mean over tokens."""
    logits = torch.randn(B, T, 2, V, generator=G, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, V, (B, T, 2), generator=G)
    reward = thoughts.thought_rewards(AFTER, BASE, passes=2)
    flat = tokenrl.token_logprobs(logits.flatten(1, 2), ids.flatten(1), temperature=thoughts.TEMPERATURE)
    logp = flat.logp.view(B, T, 2).mean(-1)
    loss = thoughts.SCALE * tokenrl.policy_loss("reinforce", logp, None, reward, advantages_per="token")[0]
    actions = (logits / 3).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = 1e6 * sum((-reward * actions[..., a]).mean() for a in range(2)) / 2
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_cot2s_ratio(how):
    """Steps of K tokens and a last one of one, in their own words: exp(sum) of logits / K, or exp(mean)."""
    logits = torch.randn(B, T, V, generator=G, dtype=torch.float64).requires_grad_()
    old = logits.detach() + 0.3 * torch.randn(B, T, V, generator=G)
    ids = torch.randint(0, V, (B, T, K), generator=G)
    ids[:, -1, 1:] = -100
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0])
    scale = (ids != -100).sum(-1).clamp(min=1).double() if how == "sum" else 1.0

    def logp_of(z):
        return thoughts.multi_token_logp(
            tokenrl.token_logprobs(z, ids, temperature=scale, outputs=["logp"]).logp, ids, how=how
        )

    loss, _ = tokenrl.policy_loss(thoughts.COT2, logp_of(logits), logp_of(old), advantages.double())
    total = 0
    for i in range(B):
        for t in range(T):
            drawn, k = (ids[i, t], K) if t < T - 1 else (ids[i, t, :1], 1)
            z, y = (x[i, t] / k if how == "sum" else x[i, t] for x in (logits, old))
            change = (z.log_softmax(-1) - y.log_softmax(-1))[drawn]
            ratio = (change.sum() if how == "sum" else change.mean()).exp()
            total = total - torch.minimum(ratio * advantages[i], ratio.clamp(0.9, 1.1) * advantages[i])
    torch.testing.assert_close(loss, total / (B * T))
    grads = [torch.autograd.grad(x, logits)[0] for x in (loss, total / (B * T))]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def test_soft_labels_are_a_truncated_list():
    """-sum q log p of a target with K entries; its gradient (sum q) p - q."""
    logits = torch.randn(B, T, V, generator=G, dtype=torch.float64).requires_grad_()
    ids = torch.rand(B, T, V, generator=G).topk(K).indices
    target = torch.rand(B, T, K, generator=G, dtype=torch.float64).softmax(-1)
    logp = tokenrl.token_logprobs(logits, ids, outputs=["logp"]).logp
    loss, _ = tokenrl.topk_distillation_loss("soft_ce", logp, target.log(), rest="truncated")
    dense = torch.zeros_like(logits).scatter(-1, ids, target)
    torch.testing.assert_close(loss, -(dense * logits.log_softmax(-1)).sum(-1).mean())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], (logits.softmax(-1) - dense).detach() / (B * T))


ERRORS = {
    "passes": (lambda: thoughts.thought_rewards(AFTER, BASE, passes=3), "passes: got 3, accepted: 1, or a divisor"),
    "packed": (
        lambda: thoughts.thought_rewards(AFTER[0], BASE[0], passes=2, cu_seqlens=torch.tensor([0, T])), "passes: got 2"
    ),
    "worse": (lambda: thoughts.thought_rewards(AFTER, BASE, worse="drop"), "worse: got 'drop', accepted: zero, keep"),
    "logp": (lambda: thoughts.thought_rewards(AFTER[1:], BASE), r"logp: got a torch.Tensor of torch.float64 \[3, 6"),
    "ids": (lambda: thoughts.multi_token_logp(AFTER, MASK[..., None].long()), r"ids: got shape \[4, 6, 1\], accepted"),
    "how": (lambda: thoughts.multi_token_logp(AFTER, AFTER.long(), how="max"), "how: got 'max', accepted: sum, mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
