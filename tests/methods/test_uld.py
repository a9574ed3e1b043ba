"""ULD and GOLD: formulas in loops, TRL's own functions on the same inputs, errors."""

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_source import methods

import tokenrl
from tokenrl.methods import uld

FILE = "experimental/gold/gold_trainer.py"
WANTED = (
    "_align_by_byte_offsets", "_merge_probabilities_with_alignment_groups", "_compute_hybrid_uld_loss",
    "_compute_jsd_loss_for_matched_tokens",
)  # fmt: skip


def gold():
    """TRL's ULDLoss, of these methods."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("trl is not installed")
    path, functional = Path(found.origin).parent / FILE, torch.nn.functional
    trainer = methods(path, "GOLDTrainer", "generalized_jsd_loss", F=functional).generalized_jsd_loss
    return methods(path, "ULDLoss", *WANTED, F=functional, GOLDTrainer=SimpleNamespace(generalized_jsd_loss=trainer))


def text(rng):
    """Where the tokens of both end, in bytes; some cut short, some with a token of no width behind."""
    length = rng.randint(1, 12)

    def ends():
        cuts = sorted(rng.sample(range(1, length + 1), rng.randint(1, length)))
        if rng.random() < 0.7:
            cuts = [*(cut for cut in cuts if cut != length), length]
        return cuts + cuts[-1:] * (rng.random() < 0.2)

    return ends(), ends()


def groups(spans, number):
    return [(spans == n).nonzero().flatten().tolist() for n in range(number)]


def test_spans_of_trl():
    theirs, rng = gold()._align_by_byte_offsets, random.Random(0)
    for _ in range(300):
        pair = text(rng)
        found = theirs(*([(0, end) for end in ends] for ends in pair))
        expected = [(own, other) for own, other in zip(*found, strict=True) if own and other]
        spans, other_spans, number = uld.aligned_spans(*pair)
        assert number == len(expected)
        assert list(zip(groups(spans, number), groups(other_spans, number), strict=True)) == expected
    assert uld.aligned_spans([3, 5, 9], [1, 5, 7])[0].tolist() == [0, 0, 1]
    assert uld.aligned_spans([3, 5], [5, 5])[1].tolist() == [0, -1]


def case(seed=0, n=7, vocab=9):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, vocab, generator=g, dtype=torch.float64) * 2
    return logits.requires_grad_(), torch.randint(0, vocab, (n,), generator=g)


SPANS = torch.tensor([0, 0, 1, -1, 2, 2, 2])


@pytest.mark.parametrize("merge", uld.MERGES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_merged_probabilities_of_trl(merge, temperature):
    logits, ids = case()
    with torch.no_grad():
        logits[5, ids[5]] = logits[5].max() - 60  # below the floor
    theirs = gold()()
    theirs.token_merge_strategy = merge
    probabilities = (logits / temperature).softmax(-1)
    expected = theirs._merge_probabilities_with_alignment_groups(probabilities, groups(SPANS, 3), ids.tolist())
    found = uld.span_probabilities(logits, ids, SPANS, 3, merge=merge, temperature=temperature)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = [torch.autograd.grad(x, logits, upstream)[0] for x in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def test_sorted_l1_in_a_loop():
    logits, _ = case(1)
    p, r = logits.softmax(-1), case(2, vocab=6)[0].detach().softmax(-1)
    for most, count in ((None, 9), (4, 4), (99, 6)):
        expected = []
        for row, other in zip(p.tolist(), r.tolist(), strict=True):
            pair = [sorted(x, reverse=True) + [0] * 9 for x in (row, other)]
            expected.append(sum(abs(x - y) for x, y in list(zip(*pair, strict=False))[:count]))
        found = uld.sorted_l1(p, r, most=most)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    order = p.detach().argsort(-1, descending=True)
    signs = (p.detach().gather(-1, order) - torch.nn.functional.pad(r.sort(-1, descending=True).values, (0, 3))).sign()
    (grad,) = torch.autograd.grad(uld.sorted_l1(p, r).sum(), p)
    torch.testing.assert_close(grad, torch.zeros_like(grad).scatter(-1, order, signs))


@pytest.mark.parametrize("beta,weights,extra", [(0.0, None, 2), (0.5, (0.7, 0.2), 2), (1.0, None, 2), (0.5, None, 0)])
def test_hybrid_of_trl(beta, weights, extra):
    """The mean over spans, as its batchmean and its division by the length have it."""
    logits, ids = case(3)
    vocab = 9 + extra if extra else 4  # without more than the matched ids there is nothing to sort
    p = uld.span_probabilities(logits, ids, SPANS, 3)
    other, other_ids = case(4, vocab=vocab)
    r = uld.span_probabilities(other.detach(), other_ids, SPANS, 3)
    matched = dict(zip([0, 3, 7, 10] if extra else range(4), [4, 1, 8, 0], strict=True))  # teacher's id: student's
    theirs = gold()()
    theirs._teacher_matched_ids, theirs.beta = set(matched), beta
    theirs.mapping_tensor = torch.full((vocab,), -1)
    theirs.mapping_tensor[list(matched)] = torch.tensor(list(matched.values()))
    theirs.hybrid_matched_weight, theirs.hybrid_unmatched_weight = weights or (None, None)
    expected = theirs._compute_hybrid_uld_loss(p, r)
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or tokenrl.divergence("jsd", beta=beta)
    pair = torch.tensor(list(matched.values())), torch.tensor(list(matched))
    found = uld.hybrid_uld(p, r, *pair, kind=kind, weights=weights).mean()
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


LOGITS, IDS = torch.randn(3, 5), torch.tensor([0, 1, 2])
ERRORS = {
    "merge": ({"merge": "bayes"}, "merge: got 'bayes', accepted: observed, bayesian. Did you mean 'bayesian'"),
    "spans": ({"spans": torch.tensor([0, 1])}, r"spans: got \[2\] from 0 to 1, accepted: \[3\] from -1 to 1"),
    "range": ({"spans": torch.tensor([0, 1, 2])}, r"spans: got \[3\] from 0 to 2, accepted: \[3\] from -1 to 1"),
    "missing": ({"spans": torch.tensor([0, 0, -1])}, r"spans: got only \[0\], accepted: every number from 0 to 1"),
    "logits": ({"logits": LOGITS[0]}, r"logits: got a torch.Tensor of torch.float32 \[5\], accepted: bf16"),
    "floor": ({"floor": 0}, "floor: got 0, accepted: a number above 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, message = ERRORS[name]
    given = {"logits": LOGITS, "ids": IDS, "spans": torch.tensor([0, 1, -1]), "number": 2} | given
    with pytest.raises(ValueError, match=f"^{message}"):
        uld.span_probabilities(**given)


def test_errors_of_the_losses():
    with pytest.raises(ValueError, match=r"^other: got a torch.Tensor of torch.float32 \[2, 5\], accepted: floats \[3"):
        uld.sorted_l1(LOGITS, LOGITS[1:])
    with pytest.raises(ValueError, match=r"^other_matched: got shape \[2\], accepted: as many as matched, \[3\]"):
        uld.hybrid_uld(LOGITS, LOGITS, IDS, IDS[1:])
