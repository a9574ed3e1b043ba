"""Hooks into trainers whose world has tensor-, sequence- or context-parallel ranks: what two of them find is what one
process does, loss and gradients. two_processes.py runs the cases; the hosts' own text is what calls the hooks."""

import importlib.util
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import verl_source
from models_on_ranks import fused_model, trl_head
from paths import ROOT
from rank_numbers import TOLERANCE, generator, held, normal, part, weighed
from slime_on_ranks import slime_context

SPEC = importlib.util.spec_from_file_location("ray_workers", ROOT / "examples" / "ray_workers.py")
example = importlib.util.module_from_spec(SPEC)
sys.modules["ray_workers"] = example  # where its dataclass looks annotations up
SPEC.loader.exec_module(example)
ROWS, WIDTH, VOCABULARY = 14, 8, 22


def drawn():
    """hidden, weight, ids of a head, the same on all ranks."""
    return (
        normal(ROWS, WIDTH),
        normal(VOCABULARY, WIDTH, seed=4),
        torch.randint(VOCABULARY, (ROWS,), generator=generator()),
    )


def exact(hidden, weight, ids, temperature=1.0):
    """(log-probs, entropies, gradients of hidden and weight) of one process, in torch."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    rows = ((hidden @ weight.T) / temperature).log_softmax(-1)
    logp, entropy = rows.gather(-1, ids[..., None])[..., 0], -(rows.exp() * rows).sum(-1)
    return logp.detach(), entropy.detach(), *torch.autograd.grad(weighed(logp, entropy), (hidden, weight))


class _GatherFromSequenceParallelRegion(torch.autograd.Function):
    """Megatron's: the ranks' tokens side by side; the backward sums their gradients and scatters the sum."""

    @staticmethod
    def forward(ctx, own):
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        return torch.cat(every)

    @staticmethod
    def backward(ctx, grad):
        whole = grad.clone()
        dist.all_reduce(whole)
        return part(whole, dist.group.WORLD)


@contextmanager
def modules(**made):
    """As if they were imported, by names with dots as __."""
    names = {name.replace("__", "."): module for name, module in made.items()}
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def megatron(group):
    """What hooks ask of Megatron: its group."""
    state = ModuleType("megatron.core.parallel_state")
    state.get_tensor_model_parallel_group = lambda: group
    core = ModuleType("megatron.core")
    core.parallel_state = state
    return {"megatron": ModuleType("megatron"), "megatron__core": core, "megatron__core__parallel_state": state}


def verl_head(group, sequence_parallel):
    """verl's hook into Megatron's postprocessing (models/mcore/model_forward_fused.py), its head by fuse()."""
    from tokenrl.integrations import verl
    from tokenrl.integrations.verl import head

    fused = verl_source.lifted(head.FUSED, "utils/experimental/torch_functional.py", lambda node: True)
    kernel = verl_source.lifted(head.KERNEL, "utils/kernel/linear_cross_entropy.py", lambda node: True)
    known = {
        "parallel_state": megatron(group)["megatron__core__parallel_state"],
        "CausalLMOutputForPPO": SimpleNamespace,
    }
    known |= {"gather_from_sequence_parallel_region": _GatherFromSequenceParallelRegion.apply}
    known |= {"has_config_logger_enabled": lambda config: False, "linear_cross_entropy": kernel.linear_cross_entropy}
    file = "models/mcore/model_forward_fused.py"
    caller = verl_source.lifted("verl.models.mcore", file, verl_source.named("fused_output_processor"), **known)
    hidden, weight, ids = drawn()
    truth = exact(hidden, weight, ids, 0.7)
    hidden = (part(hidden, group) if sequence_parallel else hidden).requires_grad_()
    own = part(weight, group).requires_grad_()
    names = {head.FUSED: fused, head.KERNEL: kernel, "verl.models.mcore": caller}
    with modules(**{name.replace(".", "__"): module for name, module in names.items()}):
        verl.fuse()
        try:
            found = caller.fused_output_processor(
                hidden_states=hidden, output_layer=SimpleNamespace(weight=own), output_weight=None, labels=ids,
                context=SimpleNamespace(temperature=0.7), config=SimpleNamespace(sequence_parallel=sequence_parallel),
            )  # fmt: skip
            weighed(found.log_probs, found.entropy).backward()
        finally:
            verl.unfuse()
    of_hidden = part(truth[2], group) if sequence_parallel else truth[2]
    held(
        (*truth[:2], of_hidden, part(truth[3], group)),
        (found.log_probs.detach(), found.entropy.detach(), hidden.grad, own.grad),
    )


def verl_logits(group):
    """verl's functions of logits on ranks (utils/megatron/tensor_parallel.py), by patch()."""
    from tokenrl.integrations import verl
    from tokenrl.integrations.verl import head

    functions = ModuleType(head.FUNCTIONS)
    functions.logprobs_from_logits = lambda *args: None
    engine, on_ranks = ModuleType("verl.workers.engine.megatron"), ModuleType(head.ON_RANKS)
    for name in head.NAMES_ON_RANKS:
        setattr(on_ranks, name, lambda *args: None)
        setattr(engine, name, getattr(on_ranks, name))
    own = part(drawn_logits(), group, -1).requires_grad_()
    ids = drawn()[2]
    names = {head.FUNCTIONS: functions, head.ON_RANKS: on_ranks, engine.__name__: engine}
    with modules(**megatron(group), **{name.replace(".", "__"): module for name, module in names.items()}):
        verl.patch()
        try:
            logp = engine.vocab_parallel_log_probs_from_logits(own[None], ids[None])
            entropy = engine.vocab_parallel_entropy_with_chunking(own[None], 3)
            assert logp.shape == entropy.shape == (1, ROWS)
            assert torch.equal(entropy[0], on_ranks.vocab_parallel_entropy(own))
            weighed(logp[0], entropy[0]).backward()
        finally:
            verl.unpatch()
        for name, ours in head.NAMES_ON_RANKS.items():
            assert getattr(engine, name) is getattr(on_ranks, name) is not ours
    logits = drawn_logits().requires_grad_()
    rows = logits.log_softmax(-1)
    truth = rows.gather(-1, ids[:, None])[:, 0], -(rows.exp() * rows).sum(-1)
    (grad,) = torch.autograd.grad(weighed(*truth), logits)
    held((*(x.detach() for x in truth), part(grad, group, -1)), (logp[0].detach(), entropy[0].detach(), own.grad))


def drawn_logits():
    hidden, weight, _ = drawn()
    return hidden @ weight.T


def verl_ulysses(group):
    """A sequence of Ulysses' ranks: each the head of its tokens, gathered by verl's own function, padding at the end;
    the loss is a row's, on every rank, and FSDP's mean over the ranks makes the gradients of parameters whole."""
    from tokenrl.integrations.verl import head
    from tokenrl.integrations.verl.loss import own_loss
    from tokenrl.integrations.verl.modes import nothing
    from tokenrl.objectives.policy import OBJECTIVES

    ulysses = verl_source.lifted("verl.utils.ulysses", "utils/ulysses.py", lambda node: True)
    loss_of = own_loss("ctpo", OBJECTIVES["ctpo"], nothing, {})
    hidden, weight, ids = drawn()
    hidden, ids = hidden[:-1], ids[:-1]  # an odd number of tokens
    old, advantages = normal(1, ROWS - 1, seed=7) * 0.1 - 3.0, normal(1, 1, seed=8).expand(1, ROWS - 1)
    given = {
        "old_log_prob": old, "advantages": advantages, "response_mask": torch.ones(1, ROWS - 1),
        "config": verl_source.actor_config("token-mean", {"dp_size": 1, "batch_num_tokens": ROWS - 1}),
    }  # fmt: skip

    def grads(whole, hidden, weight):
        loss, _ = loss_of(log_prob=whole[None], **given)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    alone = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    truth = grads(head.head(*alone, ids, 1.0)[0], *alone)
    ulysses.set_ulysses_sequence_parallel_group(group)
    assert ulysses.get_ulysses_sequence_parallel_group() is group
    own_ids, _, padding = ulysses.ulysses_pad_and_slice_inputs(ids[None], sp_size=group.size())
    padded = torch.nn.functional.pad(hidden, (0, 0, 0, padding))
    own, shared = part(padded, group).requires_grad_(), weight.clone().requires_grad_()
    logp = head.head(own, shared, own_ids[0], 1.0)[0]
    whole = ulysses.gather_outputs_and_unpad(logp, gather_dim=0, unpad_dim=0, padding_size=padding)
    loss, of_hidden, of_weight = grads(whole, own, shared)
    dist.all_reduce(of_weight, group=group)
    every = [torch.empty_like(of_hidden) for _ in range(group.size())]
    dist.all_gather(every, of_hidden, group=group)
    world = group.size()
    held(truth, (loss, torch.cat(every)[: ROWS - 1] / world, of_weight / world))


def ray_workers(group):
    """The ranks of examples/ray_workers.py, without Ray: both share the vocabulary, then each has half of the batch."""
    for tp, dp in ((2, 1), (1, 2)):
        worker = example.Worker()
        worker.join(group.rank(), tp, dp)
        truth, weights = example.alone(2)
        for step, expected in enumerate(truth):
            loss = worker.step(example.drawn(step).part(group.rank() // tp, dp))
            assert abs(loss - expected) < TOLERANCE * abs(expected), (loss, expected)
        heads = weights[1].chunk(tp)
        held((weights[0], heads[group.rank() % tp]), worker.weights())
        assert (weights[1] - example.Policy().weights[1]).abs().max() > 1e-3  # it learns


CASES = {
    "verl, a head of Megatron's": lambda group: verl_head(group, False),
    "verl, a head of Megatron's, sequence-parallel": lambda group: verl_head(group, True),
    "verl, logits of Megatron's": verl_logits,
    "verl, Ulysses": verl_ulysses,
    "trl, a head of tensor-parallel ranks": trl_head,
    "fused, a tensor-parallel model": fused_model,
    "slime and miles, context-parallel responses": slime_context,
    "workers of an example": ray_workers,
}


def run(group):
    """Each of them; its name when all ranks hold."""
    for name, case in CASES.items():
        case(group)
        dist.barrier(group)
        if group.rank() == 0:
            print(f"HELD {name}", flush=True)
