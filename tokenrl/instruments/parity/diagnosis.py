"""Which usual mistake a wrong loss has: each is computed, and compared with it by the tolerance rule."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...objectives.policy import OBJECTIVES, Objective
from ..progress import tracked
from ..record import first
from ..rollout_batch import RolloutBatch
from .comparison import held_to
from .computation import Change, Computation, Outcome
from .held import Dtype, Held
from .mistakes import MISTAKES, Mistake
from .tolerance import sum_errors
from .user_loss import UserLoss

ROUGHLY, FAR = 1e-3, 100  # of the terms' sum, and times what is allowed: values farther apart are not compared further
ENTRIES, FEWEST, MOST = 20_000_000, 64, 4096  # of logits, and tokens, that a loss is diagnosed on
Candidate = tuple[Mistake, Computation]  # and what it makes of the right computation


def diagnosed(loss: UserLoss, batch: RolloutBatch, dtype: Dtype) -> list[Mistake]:
    """The mistakes whose value and gradient are those of a loss and not of the right one; where there is none the rows
    of the table, then two mistakes at once. batch: as the loss takes it. dtype: the precision that it is wrong in."""
    found, held = _of_part(loss, batch, dtype)
    start = held.start()
    singles = [(one, one.change(start)) for one in tracked(MISTAKES, lambda one: one.name) if one.applies(start)]
    for among in (lambda: singles, lambda: other_rows(start), lambda: pairs(singles, start)):
        if named := _named(found, held, dtype, among()):
            return named
    return []


def _of_part(loss: UserLoss, batch: RolloutBatch, dtype: Dtype) -> tuple[Outcome, Held]:
    """On some of the sequences, where the loss is wrong there too."""
    for part in (small(batch), batch):
        held = Held(part, loss.leaves(part), eager=True)
        try:
            found = loss.outcome(held.given(dtype))
        except RuntimeError:  # it asks for as many sequences as there are
            continue
        if part is batch or not held_to(found, held, dtype, held.undecided(dtype)).held:
            break
    return found, held


def small(batch: RolloutBatch) -> RolloutBatch:
    """Its first sequences, as few as have some tokens, both signs of advantages and whole groups."""
    layout, tensors = batch.layout, batch.tensors
    vocabulary = tensors["logits"].shape[-1] if "logits" in tensors else len(tensors.get("weight", ()))
    wanted = min(max(ENTRIES // max(vocabulary, 1), FEWEST), MOST)
    advantages = layout.per_token(tensors.get("advantages"), torch.zeros(layout.num_tokens))
    groups = tensors.get("group_ids")
    for count in range(1, layout.num_sequences):
        end = int(layout.cu_seqlens[count])
        enough = int(layout.valid()[:end].sum()) >= wanted
        signs = all((sign * advantages[:end] > 0).any() or not (sign * advantages > 0).any() for sign in (1, -1))
        if enough and signs and (groups is None or groups[count] != groups[count - 1]):
            return first(batch, count)
    return batch


def other_rows(start: Computation) -> list[Candidate]:
    """The loss is right, of another objective."""
    changes = {name: becoming(row) for name, row in OBJECTIVES.items()}
    return [(Mistake(f"the loss of {name!r}", "", change), change(start)) for name, change in changes.items()]


def becoming(row: Objective) -> Change:
    return lambda computation: replace(computation, row=row).set(aggregation=None)


def pairs(singles: Sequence[Candidate], start: Computation) -> list[Candidate]:
    """Two at once, of those that make a difference of their own."""
    seen, distinct = {_effect(start)}, []
    for one, changed in tracked(singles, lambda candidate: candidate[0].name):
        if (effect := _effect(changed)) not in seen:
            seen.add(effect)
            distinct.append((one, changed))
    return [
        (_both(one, other), other.change(changed))
        for at, (one, changed) in enumerate(distinct)
        for other, _ in distinct[at + 1 :]
        if one.name != other.name and other.applies(changed)
    ]


def _both(one: Mistake, other: Mistake) -> Mistake:
    return Mistake(f"{one}, and {other}", "", lambda computation: other.change(one.change(computation)))


def _effect(computation: Computation) -> tuple[str, ...]:
    """Value and gradient to three digits, which tell mistakes apart that are worth a pair."""
    logp = computation.logp.detach().requires_grad_()
    loss, _ = replace(computation, logp=logp).run()
    (gradient,) = torch.autograd.grad(loss, logp, allow_unused=True, materialize_grads=True)
    weighed = gradient.flatten() * torch.linspace(1, 2, gradient.numel(), dtype=gradient.dtype)
    return tuple(f"{x.item():.2e}" for x in (loss, weighed.sum(), weighed.abs().sum()))


def _named(found: Outcome, held: Held, dtype: Dtype, candidates: Sequence[Candidate]) -> list[Mistake]:
    terms, base = held.truth.terms, held.base(dtype).terms
    ((_, _, allowed),) = sum_errors(found.value, terms, base)
    near = min(ROUGHLY * terms.abs().sum().item(), FAR * allowed)
    near *= max(1.0, found.value.abs().item() / max(terms.abs().sum().item(), 1e-30))
    return [
        one
        for one, computation in tracked(candidates, lambda candidate: candidate[0].name)
        if _apart(computation, found) <= near and _is(one, found, held, dtype)
    ]


def _apart(computation: Computation, found: Outcome) -> float:
    """Of the values, where the candidate's is as large as what was found."""
    try:
        with torch.no_grad():
            value, _ = computation.run()
    except ValueError:  # the batch has not what another row needs
        return float("inf")
    return (value - found.value.double()).abs().item()


def _is(mistake: Mistake, found: Outcome, held: Held, dtype: Dtype) -> bool:
    changed = held.with_change(mistake.change)
    ((_, error, allowed),) = sum_errors(found.value, changed.truth.terms, changed.base(dtype).terms)
    if error > FAR * allowed:  # what follows takes longer
        return False
    but = changed.undecided(dtype)
    if not held_to(found, changed, dtype, but).held:
        return False
    # What the right loss gives must not pass for it too, else nobody could tell them apart on this batch.
    return not held_to(held.outcome(dtype), changed, dtype, but).held
