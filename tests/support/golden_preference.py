"""Recorded preference losses: the cases of a family, and how a loss of ours is held to one."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl


def cases(family, *left_out):
    return pytest.mark.parametrize("case", [case for case in INDEX[family]["cases"] if case not in left_out])


def read(family, case):
    return arrays(family, case), INDEX[family]["cases"][case]["config"]


def alike(loss, x, leaf, mask=None, rtol=1e-9):
    """leaf: the logits; or the log-probs, whose masked cells the code sums as the zeros that they hold there, so that
    what it records as their gradient is none."""
    near(loss, x["loss"], "loss", rtol)
    expected = x["grad_logits"] if mask is None else torch.where(mask, x["grad_logps"], 0)
    near(torch.autograd.grad(loss, leaf)[0], expected, "gradient", rtol)


def spoiled(x, mask):
    """Masked cells may hold anything."""
    return torch.where(mask, x, torch.nan)


def shifted(logits, labels):
    """(log-probs of the labels, their mask), of logits at position t that predict label t + 1."""
    labels = labels[:, 1:]
    mask = labels != -100
    return tokenrl.token_logprobs(logits[:, :-1], labels.clamp(min=0), outputs=["logp"]).logp, mask
