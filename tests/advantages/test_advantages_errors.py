"""Wrong arguments of the advantage estimators: the error names the argument, what was given, what is accepted."""

import pytest
import torch

from tokenrl import advantages as adv

X, G = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1])
M, R = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4)
ERRORS = [
    (lambda: adv.grpo(X.long(), G), r"rewards: got dtype torch.int64, accepted: .*rewards.float\(\)"),
    (lambda: adv.rloo(X > 1, G), r"rewards: got dtype torch.bool, accepted: .*rewards.float\(\)"),
    (lambda: adv.grpo(X[None], G), r"rewards: got shape \[1, 3\], accepted: \[S\]"),
    (lambda: adv.grpo(X), "group_ids: got None, accepted: one integer per sequence"),
    (lambda: adv.grpo(X, G.float()), "group_ids: got dtype torch.float32"),
    (lambda: adv.grpo(X, G[:2]), r"group_ids: got \[2\]"),
    (lambda: adv.grpo(X, G, scale="group"), "scale: got 'group', accepted: std, none, batch"),
    (lambda: adv.pass_at_k(X, G, scale="batch"), "scale: got 'batch', accepted: std, none"),
    (lambda: adv.grpo(X, G, singleton="one"), "singleton: got 'one', accepted: raw, zero"),
    (lambda: adv.grpo(X, mean=X[:2], std=X), r"mean: got shape \[2\]"),
    (lambda: adv.rloo(X, mean=X), "count: got None"),
    (lambda: adv.grpo(X.requires_grad_(), G), "rewards: got a tensor that requires grad"),
    (lambda: adv.opo(R[:, 0], X.detach(), G), "lengths: got dtype torch.float32"),
    (lambda: adv.gdpo(R, G, weights=R[0, :2]), r"weights: got shape \[2\]"),
    (lambda: adv.gdpo(R[:, :0], G), r"rewards: got shape \[3, 0\], accepted: \[S, K\]"),
    (lambda: adv.maxrl(X.detach(), G, singleton="one"), "singleton: got 'one', accepted: raw, zero"),
    (lambda: adv.soft_value(X.detach(), G, tau=0), "tau: got 0, accepted: a number above 0"),
    (lambda: adv.opmd(X.detach(), G, baseline="median"), "baseline: got 'median', accepted: mean, soft"),
    (lambda: adv.rae(X.detach(), G, X[:1].detach()), r"agents: got 0 to 1, accepted: numbers of baselines, \[0, 1\)"),
    (lambda: adv.rae(X.detach(), G[:2], X.detach()), r"agents: got \[2\] on cpu"),
    (lambda: adv.gae(R, R, M.long()), "mask: got dtype torch.int64"),
    (lambda: adv.gae(R, R[:2], M), r"values: got shape \[2, 4\]"),
    (lambda: adv.gae(R, R, M, 1.5), r"gamma: got 1.5, accepted: a number in \[0, 1\]"),
    (lambda: adv.gae(R, R, M, 1.0, -0.1), "lam: got -0.1"),
    (lambda: adv.gae(R, R, M, 1.0, torch.tensor([0.5, 2.0, 1.0])), "lam: got 0.5 to 2.0 in the tensor"),
    (lambda: adv.gae(R, R, M, 1.0, torch.ones(2)), r"lam: got shape \[2\].*a number, 0-d or \[3\]"),
    (lambda: adv.discounted_returns(R, M, R), r"gamma: got shape \[3, 4\]"),
    (
        lambda: adv.grpo(X.detach(), G, eps=X.detach()),
        r"eps: got a torch.Tensor of torch.float32 \[3\], accepted: a number",
    ),
    (lambda: adv.gae(R.long(), R, M), "token_rewards: got dtype torch.int64"),
    (lambda: adv.whiten(R, M, mean=0.0), "var: got None"),
    (lambda: adv.otb(R, G, R, R, M, position="row"), "position: got 'row', accepted: column, valid"),
    (lambda: adv.reinforce_plus_plus_baseline(R[:2, 0], G[:2], M), "rewards: got shape"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
