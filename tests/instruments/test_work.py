"""The model of what an op has to do at least."""

import torch

import tokenrl
from tokenrl.instruments.work import FORMULAS
from tokenrl.ops import divergence_ops, kernel_ops, linear_divergence_ops, linear_ops

D, V = 8, 31


def by_what(profile):
    return {line.what: line for line in profile.lines if line.level == 0}


def test_every_op_has_a_model_of_its_work():
    schemas = (part.SCHEMAS for part in (kernel_ops, linear_ops, divergence_ops, linear_divergence_ops))
    ops = {tuple(op.partition("_backward")[:2]) for part in schemas for op in part}
    assert {(op, "backward" if way else "forward") for op, way in ops} <= FORMULAS.keys()


def test_a_divergence_reads_both_heads():
    """Of the rows that take part; from hidden states each logit has three exponentials with its gradient."""
    logits, other, hidden, weight = (torch.randn(*shape) for shape in ((2, 6, V), (2, 6, V), (2, 6, D), (V, D)))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    with tokenrl.profile() as p:
        tokenrl.token_divergence(logits.requires_grad_(), other, row_mask=mask).sum().backward()
    found = by_what(p)
    for way, written in (("forward", 0), ("backward", 4 * 12 * V)):
        line = found[f"divergence {way}"]
        assert (line.read, line.written, line.exponentials) == (2 * 4 * 6 * V, written, 2 * 6 * V)
    with tokenrl.profile() as p:
        trained = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        tokenrl.linear_distillation_loss("gkd", *trained, hidden, weight.flip(0), mask=mask)[0].backward()
    forward = by_what(p)["linear_divergence forward"]
    read, written = 4 * 2 * (6 * D + V * D), 4 * (12 * D + V * D)
    assert (forward.read, forward.written, forward.exponentials) == (read, written, 6 * 6 * V)
