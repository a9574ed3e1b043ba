"""Cases of a batch split over data-parallel ranks and micro-batches: the parts add up to the whole."""

import functools

import torch
from cases import batch
from torch.nn.parallel import DistributedDataParallel
from vocab_cases import said

import tokenrl
from tokenrl import wire
from tokenrl.distributed import AVERAGED_OVER, averaged_over, global_weights
from tokenrl.objectives.aggregations import AGGREGATIONS

ROWS, NEAR = 11, functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def whole_batch():
    case = batch(7, rows=ROWS, width=9, poison=False)
    case["group_ids"] = torch.arange(ROWS) % 3  # on every rank
    return {name: case[name] for name in ("logp", "old_logp", "advantages", "mask", "group_ids")}


def micro_batches(case, group):
    """The rows of a rank, cut into parts of unequal size, and one without a token."""
    rows = torch.arange(group.rank(), ROWS, group.size())
    parts = [{name: x[at] for name, x in case.items()} for at in (rows[:1], rows[1:])]
    return [*parts, parts[0] | {"mask": torch.zeros_like(parts[0]["mask"])}]


def weights_of(aggregation, parts, group, **how):
    of = {name: [part[name] for part in parts] for name in ("advantages", "group_ids")}
    masks = [part["mask"] for part in parts]
    return global_weights(aggregation, masks, group=group, dtype=torch.float64, **of, **how)


def part_loss(part, weight):
    part = {name: x for name, x in part.items() if name != "group_ids"}
    arguments = [part.pop(name) for name in ("logp", "old_logp", "advantages")]
    return tokenrl.policy_loss("grpo", *arguments, token_weight=weight, aggregation="token-sum", **part)


def every_mode(group):
    """Loss, gradient and the metrics of the whole batch, of every rank's parts."""
    case = whole_batch()
    for aggregation in AGGREGATIONS:
        normalizer = 70.0 if aggregation == "seq-mean-token-sum-norm" else None
        whole = case | {"logp": case["logp"].clone().requires_grad_()}
        arguments = [whole.pop(name) for name in ("logp", "old_logp", "advantages")]
        how = {"aggregation": aggregation, "normalizer": normalizer}
        expected, metrics = tokenrl.policy_loss("grpo", *arguments, **whole, **how)
        expected.backward()
        parts = micro_batches(case, group)
        with wire.counted() as sent:
            weights = weights_of(aggregation, parts, group, normalizer=normalizer)
        most = 1 + -(-ROWS // group.size())
        assert sent == [("all_gather", 256), ("all_gather", 8), ("all_gather", 24 * most)], sent
        total, found = torch.zeros((), dtype=torch.float64), []
        rows = torch.arange(group.rank(), ROWS, group.size())
        truth = arguments[0].grad[rows]
        for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            part["logp"] = part["logp"].clone().requires_grad_()
            loss, of_part = part_loss(part, weight)
            loss.backward()
            total += loss.detach()
            found.append(of_part)
            NEAR(part["logp"].grad, [truth[:1], truth[1:], torch.zeros_like(truth[:1])][k])
        NEAR(wire.all_reduce(total, group), expected.detach())
        NEAR(tokenrl.Metrics.merged(found).reduce(group).raw, metrics.raw)


def under_ddp(group):
    """Whose mean over ranks, and a trainer's over micro-batches, the factor undoes; what a local count gives is off."""
    torch.manual_seed(1)
    case, x = whole_batch(), torch.randn(ROWS, 9, 4, dtype=torch.float64)
    model = torch.nn.Linear(4, 1, bias=False).double()
    case |= {"logp": model(x).squeeze(-1) * 0.1 + case["logp"]}
    whole = dict(case)
    arguments = [whole.pop(name) for name in ("logp", "old_logp", "advantages")]
    tokenrl.policy_loss("grpo", *arguments, aggregation="group-mean", **whole)[0].backward()
    truth, model.weight.grad = model.weight.grad.clone(), None
    base = whole_batch()["logp"]
    parts = micro_batches(case | {"x": x, "logp": base}, group)
    ranks = DistributedDataParallel(model, process_group=group)
    for trainer, steps in (("ddp", 1), ("accelerate", len(parts))):
        divided = averaged_over(trainer, data=group.size(), micro_batches=len(parts))
        for factor, right in ((divided, True), (1, False)):
            model.weight.grad = None
            weights = weights_of("group-mean", parts, group, averaged_over=factor)
            for k, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                ranks.require_backward_grad_sync = k == len(parts) - 1
                part = dict(part)
                part["logp"] = ranks(part.pop("x")).squeeze(-1) * 0.1 + part["logp"]
                (part_loss(part, weight)[0] / steps).backward()
            assert torch.allclose(model.weight.grad, truth, rtol=1e-11, atol=1e-13) is right


def as_many_tokens_as_sequences(group):
    """Packed, three sequences and three tokens: a weight per sequence is not one per token."""
    mask, bounds = torch.ones(3, dtype=torch.bool), torch.tensor([0, 0, 1, 3])
    (found,) = global_weights(
        "seq-mean-token-mean", [mask], cu_seqlens=[bounds], group=group, averaged_over=group.size()
    )
    assert found.tolist() == [0.5, 0.25, 0.25]
    assert tokenrl.aggregation_weights("seq-mean-token-mean", mask=mask, cu_seqlens=bounds).tolist() == [
        0.5,
        0.25,
        0.25,
    ]


def factors(group):
    found = {name: averaged_over(name, data=4, context=2, micro_batches=3) for name in AVERAGED_OVER}
    assert found == {
        "sum": 1, "ddp": 8, "fsdp": 8, "megatron": 12, "megatron num_tokens": 24, "accelerate": 12, "deepspeed": 12,
    }  # fmt: skip
    said(lambda: averaged_over("ddd"), "trainer: got 'ddd'")


def data_errors(group):
    last, parts = group.rank() == group.size() - 1, micro_batches(whole_batch(), group)
    said(lambda: weights_of("token-mean" if last else "group-mean", parts, group), "aggregation: group-mean on rank 0")
    said(lambda: weights_of("token-mean", [], group), "masks: got a list")
    where = f"rank {group.size() - 1}: ValueError: averaged_over: got -1"
    said(lambda: weights_of("token-mean", parts, group, averaged_over=-1 if last else 1), where)


CASES = {
    f"data, {case.__name__}": case
    for case in (every_mode, under_ddp, as_many_tokens_as_sequences, factors, data_errors)
}
