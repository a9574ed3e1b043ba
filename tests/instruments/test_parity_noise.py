"""What a precision's errors of log-probs make of a loss: right losses hold, wrong ones do not, edges are left out."""

import pytest
import torch
from parity_batches import long

import tokenrl
from tokenrl.instruments.parity import head_rows, random_batch, report
from tokenrl.instruments.parity.held import Held, leaves_of
from tokenrl.instruments.parity.user_loss import user_loss


def ctpo(logits, ids, old_logp, advantages, mask, eps_low, eps_high, eps_dual, power, cap):
    """As its authors write it."""
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)
    x, a = torch.where(mask, logp - old_logp, 0), advantages[:, None]
    s, width = x.cumsum(1).detach() + x - x.detach(), mask.cumsum(1).clamp(min=1).to(x.dtype) ** power
    loss = torch.maximum(-a * s.clamp(max=cap).exp(), -a * s.clamp(-eps_low * width, eps_high * width).exp())
    loss = torch.where(a < 0, torch.minimum(loss, -a * (eps_dual * width).exp()), loss)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def of_wide_vocabulary(dtype=torch.float32, rows=2, width=8, vocabulary=151936):
    """Where torch's log_softmax errs most: its sum of e^z stops growing."""
    g = torch.Generator().manual_seed(0)
    tensors = {"logits": torch.randn(rows, width, vocabulary, generator=g).mul_(3).to(dtype)}
    tensors["ids"] = torch.randint(0, vocabulary, (rows, width), generator=g)
    tensors["mask"] = torch.rand(rows, width, generator=g) > 0.1
    logp = tokenrl.token_logprobs(tensors["logits"], tensors["ids"], outputs=("logp",)).logp
    tensors["old_logp"] = logp - 0.02 * torch.randn(rows, width, generator=g)
    tensors["advantages"] = torch.tensor([0.7, -1.2])
    return tokenrl.RolloutBatch(tensors, tokenrl.objective("ctpo"), {}, {})


def test_a_right_loss_by_torchs_log_softmax_holds_and_a_slightly_wrong_one_does_not():
    batch = of_wide_vocabulary()
    assert report.of_loss(user_loss(ctpo), batch).held
    held = Held(batch, ("logits",), eager=True)
    tested = held.scores(torch.float32, True)[0] - held.scores(torch.float64)[0]
    assert tested.abs().max() > 5e-6
    right = user_loss(ctpo).outcome(batch)
    wrong = type(right)(1.001 * right.value, {name: 1.001 * x for name, x in right.gradients.items()})
    assert not any(error.held for error in report.compared("wrong", "cpu", wrong, held, torch.float32).errors)


@pytest.mark.parametrize("row", ["ctpo", "ctpo_geomean", "gspo", "minpro"])
def test_long_sums_of_right_backends_hold(row):
    for seed in range(2):
        found = report.of_backends(long(row, seed=seed).cast(torch.float64), backend="cpu")
        assert [one.dtype for one in found.comparisons] == ["float32", "float64"]
        assert found.held and found.undecided < 30, (seed, found.comparisons)


def test_a_long_sum_that_is_wrong_at_one_token_does_not_hold():
    batch = long("ctpo")
    held = Held(batch, ("logp",))
    found = held.outcome(torch.float32)
    assert report.compared("right", "cpu", found, held, torch.float32, held.undecided(torch.float32)).held
    at = int(held.truth.by_logp.flatten().abs().argmax())
    found.gradients["logp"].view(-1)[at] *= 1 + 1e-3
    one = report.compared("wrong", "cpu", found, held, torch.float32, held.undecided(torch.float32))
    assert [error.held for error in one.errors] == [True, False]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("head", ["logits", "hidden"])
def test_the_parts_of_a_head_are_the_head(head, layout, monkeypatch):
    batch = random_batch(1, "grpo", head=head, entropy_coef=0.1)
    g, tokens = torch.Generator().manual_seed(0), batch.tokens
    tensors = batch.tensors | {"temperature": 0.5 + torch.rand(tokens.shape, generator=g)}
    tensors["keep_mask"] = (torch.rand(*tokens.shape, 31, generator=g) > 0.2).scatter(-1, tokens[..., None], True)
    if head == "hidden":
        tensors["bias"] = torch.randn(31, generator=g)
    if layout == "packed":
        flat = {name: x.flatten(0, 1) for name, x in tensors.items() if x.shape[:2] == tokens.shape}
        tensors |= flat | {"cu_seqlens": torch.arange(0, tokens.numel() + 1, tokens.shape[1])}
    settings = {name: x for name, x in batch.settings.items() if name != "temperature"}
    batch = tokenrl.RolloutBatch(tensors, batch.objective, settings, {})
    leaves = leaves_of(batch)
    whole = {name: x.double().requires_grad_() if name in leaves else x for name, x in tensors.items()}
    loss, _ = tokenrl.RolloutBatch(whole, batch.objective, settings, {}).cast(torch.float64).loss(backend="reference")
    truth = torch.autograd.grad(loss, [whole[name] for name in leaves])
    monkeypatch.setattr(head_rows, "ENTRIES", 31 * 7)
    held = Held(batch, leaves, eager=True)
    found = held.outcome(torch.float64)
    torch.testing.assert_close(found.value, loss.detach())
    torch.testing.assert_close(list(found.gradients.values()), list(truth))
    torch.testing.assert_close(held.scores(torch.float64)[0], held.scores(torch.float64, True)[0])


def test_a_cut_of_the_smallest_steps_finds_edges_and_nothing_else():
    """Tokens at an edge are undecided; a smooth loss has none, however far its log-probs err."""
    batch = random_batch(0, "grpo", temperature=1.0)
    logp, old = batch.log_probs("reference"), batch.tensors["old_logp"].clone()
    upper = batch.tensors["advantages"] > 0
    old[upper] = (logp - torch.log1p(torch.full_like(logp, 0.2)))[upper]
    at = tokenrl.RolloutBatch({**batch.tensors, "old_logp": old}, batch.objective, batch.settings, {})
    held = Held(at, ("logits",))
    assert torch.equal(held.undecided(torch.float32).tokens, batch.tensors["mask"] & upper[:, None])
    for row in ("sapo", "reinforce", "ratio"):
        assert Held(at.under(row), ("logits",)).undecided(torch.bfloat16).count == 0
