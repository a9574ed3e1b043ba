"""Cases of statistics of a batch that ranks and their micro-batches split: those of one process."""

import copy
import functools

import torch
from data_cases import NEAR, weights_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from vocab_cases import said

import tokenrl
from tokenrl import advantages, wire
from tokenrl.distributed import advantages_over, covariance_selection, global_weights, group_statistics, moments

SEQUENCES = 13


def of_sequences():
    g = torch.Generator().manual_seed(3)
    rewards = torch.randn(SEQUENCES, generator=g, dtype=torch.float64) + 1e3
    return rewards, torch.arange(SEQUENCES) % 4 - (1 << 60), torch.randint(1, 9, (SEQUENCES,), generator=g)


def rows_of(group):
    """Unequal, of groups on several ranks; the last rank has one."""
    world, rank = group.size(), group.rank()
    return slice(rank * 2, rank * 2 + 2) if rank < world - 1 else slice(rank * 2, None)


ESTIMATORS = {
    "grpo": (advantages.grpo, 1, {"scale": "batch"}),
    "rloo": (advantages.rloo, 1, {}),
    "gpg": (advantages.gpg, 1, {}),
    "opo": (lambda r, n, ids: advantages.opo(r, n, ids), 2, {}),
    "pass_at_k": (advantages.pass_at_k, 1, {}),
    "maxrl": (advantages.maxrl, 1, {}),
}


def every_estimator(group):
    """Bits of one process; of several rewards with their weights; of fp32."""
    (rewards, ids, lengths), mine = of_sequences(), rows_of(group)
    for name, (estimator, order, options) in ESTIMATORS.items():
        given = (rewards, ids) if order == 1 else (rewards, lengths, ids)
        found = advantages_over(estimator, *(x[mine] for x in given), group=group, **options)
        assert torch.equal(found, estimator(*given, **options)[mine]), name
    several = torch.stack([rewards, rewards.roll(1)], 1).float()
    weights = torch.tensor([0.25, 0.75])
    expected = advantages.gdpo(several, ids, weights=weights, lengths=lengths)
    with wire.counted() as sent:
        found = advantages_over(
            advantages.gdpo, several[mine], ids[mine], group=group, named={"lengths": lengths[mine]}, weights=weights
        )
    most = SEQUENCES - 2 * (group.size() - 1)
    assert sent == [("all_gather", 256), ("all_gather", 8), ("all_gather", 8 * 4 * max(most, 2))], sent
    assert torch.equal(found, expected[mine]) and found.dtype == torch.float32


def groups_and_moments(group):
    (rewards, ids, _), mine = of_sequences(), rows_of(group)
    found = group_statistics(rewards[mine], ids[mine], group=group)
    expected = advantages.group_statistics(rewards, ids)
    assert all(torch.equal(x, y[mine]) for x, y in zip(found, expected, strict=True))
    whole = advantages.grpo(rewards, ids)[mine]
    assert torch.equal(advantages.grpo(rewards[mine], mean=found.mean, std=found.std), whole)
    assert torch.equal(
        advantages.rloo(rewards[mine], mean=found.mean, count=found.count), advantages.rloo(rewards, ids)[mine]
    )
    values = torch.stack([rewards + 1e6, rewards.flip(0)], 1)
    mask = torch.arange(2 * SEQUENCES).view(-1, 2) % 5 != 0
    for some in (values, torch.where(mask, values, torch.nan)):
        masked = mask if some is not values else None
        of_all = moments(some[mine], None if masked is None else masked[mine], group=group)
        kept = values if masked is None else values[mask]
        torch.testing.assert_close(of_all.mean, kept.mean(), rtol=1e-13, atol=0)
        torch.testing.assert_close(of_all.var, kept.var(), rtol=1e-12, atol=0)
        assert of_all.count == kept.numel()
        how = {"mean": of_all.mean, "var": of_all.var}
        part = advantages.whiten(some[mine], None if masked is None else masked[mine], **how)
        NEAR(part, advantages.whiten(some, masked)[mine], rtol=1e-9, atol=1e-9)
    only = moments(values[:0] if group.rank() else values[:1, :1], group=group)
    assert only.var == 0 and only.mean == values[0, 0] and only.count == 1


def of_tokens(group):
    """(the whole batch, this rank's rows in two micro-batches)."""
    g = torch.Generator().manual_seed(5)
    logp, a = -torch.rand(SEQUENCES, 9, generator=g, dtype=torch.float64), torch.randn(SEQUENCES, generator=g).double()
    old = logp + 0.1 * torch.randn(SEQUENCES, 9, generator=g, dtype=torch.float64)
    mask = torch.rand(SEQUENCES, 9, generator=g) > 0.2
    whole = {"logp": logp, "old_logp": old, "advantages": a, "mask": mask}
    first, *_ = range(SEQUENCES)[rows_of(group)]
    last = rows_of(group).stop
    cut = [slice(first, first + 1), slice(first + 1, last)]
    return whole, [{name: x[at] for name, x in whole.items()} for at in cut], cut


def covariances(group):
    """kl_cov: the tokens of one process, and its loss and gradient; clip_cov: its share of the candidates."""
    whole, parts, cut = of_tokens(group)
    columns = {name: [part[name] for part in parts] for name in whole}
    given = columns["logp"], columns["old_logp"], columns["advantages"], columns["mask"]
    row = covariance_selection(tokenrl.objective("kl_cov", fraction=0.1), *given, group=group)
    weights = global_weights("token-mean", columns["mask"], group=group, dtype=torch.float64)
    leaf = whole["logp"].clone().requires_grad_()
    expected, metrics = tokenrl.policy_loss(tokenrl.objective("kl_cov", fraction=0.1), leaf, whole["old_logp"],
                                            whole["advantages"], mask=whole["mask"])  # fmt: skip
    (truth,) = torch.autograd.grad(expected, leaf)
    total, found = torch.zeros((), dtype=torch.float64), []
    for part, at, weight in zip(parts, cut, weights, strict=True):
        own = part["logp"].clone().requires_grad_()
        loss, of_part = tokenrl.policy_loss(row, own, part["old_logp"], part["advantages"], mask=part["mask"],
                                            token_weight=weight, aggregation="token-sum")  # fmt: skip
        NEAR(torch.autograd.grad(loss, own)[0], truth[at])
        total += loss.detach()
        found.append(of_part)
    NEAR(wire.all_reduce(total, group), expected.detach())
    NEAR(tokenrl.Metrics.merged(found).reduce(group).raw, metrics.raw)
    clip = tokenrl.objective("clip_cov", fraction=0.05, low=0.1, high=0.5)
    row = covariance_selection(clip, *given, group=group)
    both = [of_tokens(group)[0][name] for name in ("logp", "old_logp", "advantages", "mask")]
    logp, old, a, mask = both
    count, scores = mask.sum(), (a[:, None] - (a[:, None] * mask).sum() / mask.sum()) * (logp - logp[mask].mean())
    ratio = (logp - old).exp()
    clipped = torch.where(a[:, None] > 0, ratio > 1.2, ratio < 0.8)
    candidates = (mask & ~clipped & (scores > 0.1) & (scores < 0.5)).sum()
    assert candidates > 3 and row.form.rate == max(int(0.05 * count), 1) / candidates
    said(lambda: covariance_selection("grpo", *given, group=group), "row: got 'grpo', accepted: 'clip_cov' or 'kl_cov'")


def distillation_of_parts(group):
    """Under the weights of the whole batch, of data-parallel ranks as of the tokens of a context."""
    g = torch.Generator().manual_seed(2)
    logits, other = (torch.randn(SEQUENCES, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask, mine = torch.rand(SEQUENCES, 4, generator=g) > 0.2, rows_of(group)
    leaf = logits.clone().requires_grad_()
    expected, _ = tokenrl.distillation_loss("gkd", leaf, other, mask=mask, aggregation="seq-mean-token-mean")
    (truth,) = torch.autograd.grad(expected, leaf)
    (weight,) = global_weights("seq-mean-token-mean", [mask[mine]], group=group, dtype=torch.float64)
    own = logits[mine].clone().requires_grad_()
    how = {"mask": mask[mine], "token_weight": weight, "aggregation": "token-sum"}
    loss, _ = tokenrl.distillation_loss("gkd", own, other[mine], **how)
    NEAR(torch.autograd.grad(loss, own)[0], truth[mine])
    NEAR(wire.all_reduce(loss.detach().clone(), group), expected.detach())


def statistics_errors(group):
    (rewards, ids, _), mine, last = of_sequences(), rows_of(group), group.rank() == group.size() - 1
    where = f"rank {group.size() - 1}"
    over = functools.partial(advantages_over, advantages.rloo, group=group)
    said(lambda: over(rewards[mine], ids[mine][1:] if last else ids[mine]), f"{where}: ValueError: per_sequence: got a")
    said(lambda: over(rewards[mine].float() if last else rewards[mine], ids[mine]), "shapes: ", f"on {where}")
    said(
        lambda: group_statistics(rewards[mine], ids[mine], group=group, singleton="zero" if last else "raw"),
        "singleton",
    )
    said(lambda: moments(rewards[mine], rewards[mine], group=group), "mask: got a torch.Tensor of torch.float64")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = (torch.nn.Linear(4, 4, bias=False).double() for _ in range(2))

    def forward(self, x):
        return torch.log_softmax(self.head(torch.tanh(self.body(x))), -1)[..., 0].clone()


def fsdp2(group):
    """fully_shard's mean over ranks, undone by averaged_over: gradients of one process, of unequal micro-batches."""
    whole, parts, cut = of_tokens(group)
    torch.manual_seed(4)
    model, x = Model(), torch.randn(SEQUENCES, 9, 4, dtype=torch.float64)
    whole["group_ids"] = torch.arange(SEQUENCES) % 3
    one = copy.deepcopy(model)
    arguments = {name: whole[name] for name in ("mask", "group_ids")} | {"aggregation": "group-mean"}
    tokenrl.policy_loss("grpo", one(x), whole["old_logp"], whole["advantages"], **arguments)[0].backward()
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    for module in (model.body, model.head, model):
        fully_shard(module, mesh=mesh)
    for part, at in zip(parts, cut, strict=True):
        part |= {"group_ids": whole["group_ids"][at]}
    weights = weights_of("group-mean", parts, group, averaged_over=group.size())
    for k, (part, at, weight) in enumerate(zip(parts, cut, weights, strict=True)):
        model.set_requires_gradient_sync(k == len(parts) - 1)
        how = {"mask": part["mask"], "token_weight": weight, "aggregation": "token-sum"}
        tokenrl.policy_loss("grpo", model(x[at]), part["old_logp"], part["advantages"], **how)[0].backward()
    for own, expected in zip(model.parameters(), one.parameters(), strict=True):
        NEAR(own.grad.full_tensor(), expected.grad)


CASES = {
    f"statistics, {case.__name__}": case
    for case in (every_estimator, groups_and_moments, covariances, distillation_of_parts, statistics_errors, fsdp2)
}
