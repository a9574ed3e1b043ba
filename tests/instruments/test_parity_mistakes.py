"""Usual mistakes: wrong losses are named, right ones are not, and each mistake of the table can be told apart."""

import functools
from collections import Counter

import pytest
import torch
from parity_batches import long, packed
from right_losses import RIGHT, selective_log_softmax
from wrong_losses import WRONG

import tokenrl
from tokenrl.instruments.parity import assert_parity, diagnosis, random_batch, report
from tokenrl.instruments.parity.diagnosis import diagnosed
from tokenrl.instruments.parity.held import Held, leaves_of
from tokenrl.instruments.parity.mistakes import MISTAKES
from tokenrl.instruments.parity.user_loss import user_loss

LISTED = {
    "exclusive instead of inclusive prefix", "inclusive instead of exclusive prefix", "position counted over padding",
    "clip in ratio instead of log space", "mean over padded length", "sign subsets swapped", "missing suffix sum",
    "untempered log-probs", "ids shifted by one", "old and new exchanged", "sum instead of mean",
    "KL inside instead of outside the clip", "mask multiplied into the ratio", "advantages normalised twice",
    "bf16 log-probs",
}  # fmt: skip
THROUGH = tokenrl.objective("ppo", statistic="prefix_sum", flow="through")


def named(function, objective, settings, seed):
    """The names of the mistakes of a loss, whether it is wrong or not."""
    loss, row = user_loss(function), THROUGH if objective == "through" else tokenrl.objective(objective)
    head = "hidden" if "hidden" in loss.parameters else "logits"
    batch = loss.leaf_batch(random_batch(seed, row, head=head, **settings))
    return [mistake.name for mistake in diagnosed(loss, batch, torch.float32)]


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_loss_is_named(key):
    name, objective, function, settings = WRONG[key]
    found = named(function, objective, settings, 0)
    assert found[:1] == [name] and not LISTED & {*found} - {name}


@pytest.mark.parametrize("key", RIGHT)
def test_a_right_loss_holds_and_nothing_is_named(key, monkeypatch):
    if key not in ("dapo", "gspo", "ctpo", "grpo, with_reference"):  # some hundreds of pairs take seconds
        monkeypatch.setattr(diagnosis, "pairs", lambda *_: [])
    name, function, settings = RIGHT[key]
    head = "hidden" if "hidden" in user_loss(function).parameters else "logits"
    for seed in range(2):
        assert_parity(function, random_batch(seed, name, head=head, **settings))
    assert named(function, name, settings, 0) == []


def test_there_are_enough():
    assert {name for name, *_ in WRONG.values()} >= LISTED and len(RIGHT) >= 20


# Batches on which each mistake makes a difference of its own.
CASES = (
    "ctpo", "ctpo_geomean", "minpro", "dapo", "gspo", "gspo_token", "cispo", "ctpo_fixed", "sapo", "through", "mean",
    "with empty ones", "packed", "another KL", "padded on the left",
)  # fmt: skip


@functools.cache
def held(case):
    rows = {
        "through": THROUGH, "mean": tokenrl.objective(THROUGH, statistic="prefix_mean"), "with empty ones": "grpo",
        "another KL": "grpo", "padded on the left": "ctpo",
    }  # fmt: skip
    if case == "packed":
        batch = packed("grpo")
    else:
        batch = random_batch(0, rows.get(case, case), kl_coef=0.05)
    tensors, settings = dict(batch.tensors), dict(batch.settings)
    if case == "with empty ones":
        tensors["mask"] = tensors["mask"] & (torch.arange(8) != 3)[:, None]
    if case == "padded on the left":
        tensors["mask"] = tensors["mask"] & (torch.arange(24) > 3)
    if case == "another KL":
        settings |= {"kl": "kl_k2", "entropy_coef": 0.05}
    batch = tokenrl.RolloutBatch(tensors, batch.objective, settings, {})
    return Held(batch, leaves_of(batch))


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_each_mistake_can_be_told_from_the_right_loss(mistake):
    """On one row at least: its own numbers in fp32 are its own."""
    for case in CASES:
        right = held(case)
        start = right.start()
        if mistake.applies(start):
            found = right.with_change(mistake.change)
            candidates = [(mistake, mistake.change(start))]
            if diagnosis._named(found.outcome(torch.float32), right, torch.float32, candidates):
                break
    else:
        pytest.fail("no row on which it differs")
    assert not diagnosis._named(right.outcome(torch.float32), right, torch.float32, candidates)


def two_at_once(logits, ids, old_logp, advantages, mask):
    """Untempered, and averaged over padding."""
    ratio = (selective_log_softmax(logits, ids) - old_logp).exp()
    a = advantages[:, None]
    return (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).mean()


def another_row(logp, old_logp, advantages, mask):
    return (-(logp - old_logp).exp().clamp(max=5).detach() * advantages[:, None] * logp * mask).sum() / mask.sum()


def test_two_mistakes_at_once_are_named_together():
    (found, *_) = named(two_at_once, "grpo", {}, 0)
    assert "untempered log-probs" in found and "mean over padded length" in found and ", and " in found


def test_the_loss_of_another_row_is_named():
    assert named(another_row, "grpo", {}, 0) == ["the loss of 'cispo'"]


def test_what_is_no_usual_mistake_gets_no_name():
    def own(logp, old_logp, advantages, mask):
        return ((logp - old_logp).tanh() * advantages[:, None] * mask).sum()

    assert named(own, "grpo", {}, 0) == []
    with pytest.raises(AssertionError, match="its numbers are those of no usual mistake"):
        assert_parity(own, random_batch())


def test_the_assertion_says_which():
    with pytest.raises(
        AssertionError, match=r"those of\n    mean over padded length \(the sum over all tokens / \(B T"
    ):
        assert_parity(WRONG["mean over padded length: mean_of_all"][2], random_batch(), "dapo")


def test_long_sequences_are_diagnosed_on_some_of_them(monkeypatch):
    *_, function, _ = WRONG["position counted over padding: arange"]
    tried = []
    monkeypatch.setattr(diagnosis, "small", lambda batch: tried.append(small(batch)) or tried[0])
    assert report.of_loss(user_loss(function), long()).mistakes[0].startswith("position counted over padding")
    assert [part.layout.num_sequences for part in tried] == [2]


small = diagnosis.small


def test_a_loss_that_is_wrong_in_the_last_sequence_alone_is_diagnosed():
    batch = long("grpo")
    batch.tensors["mask"][:2] = True

    def whole(logp, old_logp, advantages, mask):
        loss = -torch.min(*((logp - old_logp).exp().clamp(*b) * advantages[:, None] for b in ((0, 99), (0.8, 1.2))))
        return (loss * mask).sum(1).div(logp.shape[1]).mean()

    found = report.of_loss(user_loss(whole), batch)
    assert not found.held and found.mistakes[0].startswith("mean over padded length")


def test_names_are_not_repeated_in_a_report():
    found = report.of_loss(user_loss(WRONG["advantages normalised twice: normalised_again"][2]), random_batch())
    assert Counter(name.split(" (")[0] for name in found.mistakes) == {"advantages normalised twice": 1}


def test_in_the_precision_of_the_batch(monkeypatch):
    """What takes 16-bit logits as they are is right in fp32 and wrong in bf16."""
    batch = random_batch()
    half = tokenrl.RolloutBatch(
        batch.tensors | {"logits": batch.tensors["logits"].bfloat16()}, batch.objective, batch.settings, {}
    )

    def as_they_are(logits, ids, old_logp, advantages, mask, temperature):
        logp = torch.log_softmax(logits / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)
        ratio, a = (logp - old_logp).exp(), advantages[:, None]
        return (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum(1).div(mask.sum(1)).mean()

    found = report.of_loss(user_loss(as_they_are), half)
    assert [(one.dtype, one.held) for one in found.comparisons] == [("float32", True), ("bfloat16", False)]
    assert found.mistakes[0].startswith("bf16 log-probs")
    upcast = functools.wraps(as_they_are)(lambda logits, **more: as_they_are(logits.float(), **more))
    assert_parity(upcast, half)
