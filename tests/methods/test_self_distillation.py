"""RLSD, SDAR, DFT and CHORD: formulas in loops, ms-swift's own functions, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
from host_source import HOSTS, lifted

import tokenrl
from tokenrl.methods import self_distillation as own
from tokenrl.methods import sft_weights as sft


def batch(rows=4, width=7, seed=0):
    """logp, teacher_logp with garbage in masked cells, advantages [B] of both signs and 0, mask with holes."""
    g = torch.Generator().manual_seed(seed)
    logp, teacher = -torch.rand(2, rows, width, generator=g, dtype=torch.float64) * 2
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[:, 1] = True
    logp[~mask], teacher[~mask] = torch.nan, torch.inf
    return logp, teacher, torch.tensor([1.5, -0.5, 0.0, -2.0], dtype=torch.float64), mask


def swift(file, *names, **known):
    path = HOSTS / "swift" / file
    if not path.exists():
        pytest.skip("ms-swift is not in build/hosts (make build/hosts/.done)")
    return lifted(path, *names, **known)


def same(found, expected, at):
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x, at, retain_graph=True)[0] for x in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("negative_only", [False, True])
def test_rlsd(negative_only):
    logp, teacher, advantages, mask = batch()
    how = {"share": 0.4, "eps": 0.3, "negative_only": negative_only}
    found = own.rlsd_advantages(logp, teacher, advantages, mask=mask, **how)
    clipped = 0
    for j, t in mask.nonzero().tolist():
        a, difference = advantages[j].item(), (teacher[j, t] - logp[j, t]).item()
        w = math.exp(math.copysign(1, a) * difference if a else 0)
        clipped += not 0.7 <= w <= 1.3
        weight = 1 if negative_only and a >= 0 else 0.6 + 0.4 * min(max(w, 0.7), 1.3)
        assert found[j, t].item() == pytest.approx(a * weight, rel=1e-12)
    assert clipped and not found[~mask].any()


def test_rlsd_of_ms_swift():
    logp, teacher, advantages, mask = batch()
    clean = [torch.where(mask, x, 0) for x in (teacher, logp)]
    theirs = swift("rl_core/advantage.py", "apply_rlsd_reweight").apply_rlsd_reweight
    expected = theirs(advantages, mask, *clean, 0.5, 0.2)
    torch.testing.assert_close(own.rlsd_advantages(logp, teacher, advantages, mask=mask), expected)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_sdar_of_ms_swift(mode):
    """Its loss and gradient by a row of the table; the value is typed out beside."""
    logp, teacher, _, mask = batch()
    clean, ref = (torch.where(mask, x, 0) for x in (logp, teacher))
    clean.requires_grad_()
    gate = own.sdar_gate(logp, teacher, mask=mask, beta=3.0)
    typed = [1 / (1 + math.exp(-3 * (teacher[j, t] - logp[j, t]).item())) for j, t in mask.nonzero().tolist()]
    torch.testing.assert_close(gate[mask], torch.tensor(typed, dtype=torch.float64))
    found, _ = tokenrl.policy_loss("kl_k1", clean, ref, None, mask=mask, token_weight=-gate, aggregation=mode)
    theirs = swift("rl_core/advantage.py", "_sdar_agg_loss", "compute_sdar_loss").compute_sdar_loss
    same(found, theirs(clean, ref, mask, 3.0, mode)[0], clean)


def test_dft_and_chord_of_ms_swift():
    """Their losses over logits, of a text whose first token nobody predicts."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 9, generator=g).requires_grad_()
    labels = torch.randint(0, 9, (2, 6), generator=g)
    labels[:, :2], labels[0, 4] = -100, -100
    theirs = swift("trainers/utils.py", "per_token_loss_func", F=torch.nn.functional).per_token_loss_func
    ids, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    logp = tokenrl.token_logprobs(logits[:, :-1], ids, row_mask=mask, outputs=["logp"]).logp
    now = logp.detach()
    for weight, dft in ((sft.dft_weights(now, mask=mask), True), (sft.chord_weights(now, mask=mask), False)):
        expected = theirs(SimpleNamespace(logits=logits), labels, enable_dft_loss=dft)
        if not dft:
            p = torch.exp(-expected.detach())
            expected = expected * (p * (1 - p))
        found, _ = tokenrl.policy_loss("reinforce", logp, None, torch.ones(2), mask=mask, token_weight=weight)
        same(found, expected.sum() / mask.sum(), logits)
    torch.testing.assert_close(sft.dft_weights(now, mask=mask, power=0.3)[mask], now.exp()[mask] ** 0.3)


def test_the_share_of_chord():
    theirs = swift("rlhf_trainers/utils.py", "mu_schedule_function", math=math).mu_schedule_function
    how = {"warm_up": 4, "decay": 6, "peak": 0.9, "valley": 0.05}
    for step in range(13):
        assert sft.chord_share(step, **how) == pytest.approx(theirs(step, *how.values()), abs=1e-15)
    assert sft.chord_share(2, **how) == 0.45 and sft.chord_share(99, **how) == 0.05


def test_packed_is_padded():
    logp, teacher, advantages, mask = batch()
    cu_seqlens = torch.arange(0, mask.numel() + 1, mask.shape[1])
    flat = {"mask": mask.flatten(), "cu_seqlens": cu_seqlens}
    for packed, padded in (
        (own.rlsd_advantages(logp.flatten(), teacher.flatten(), advantages, **flat),
         own.rlsd_advantages(logp, teacher, advantages, mask=mask)),
        (own.sdar_gate(logp.flatten(), teacher.flatten(), **flat), own.sdar_gate(logp, teacher, mask=mask)),
        (sft.dft_weights(logp.flatten(), **flat), sft.dft_weights(logp, mask=mask)),
        (sft.chord_weights(logp.flatten(), **flat), sft.chord_weights(logp, mask=mask)),
    ):  # fmt: skip
        assert torch.equal(packed.view(mask.shape), padded) and padded.any() and not padded[~mask].any()


LOGP = -torch.rand(2, 3)
ERRORS = {
    "gradient": (lambda: own.sdar_gate(LOGP.clone().requires_grad_(), LOGP), "logp: got a tensor that requires grad"),
    "teacher": (lambda: own.sdar_gate(LOGP, LOGP[1:]), r"teacher_logp: got shape \[1, 3\], accepted: one value per"),
    "share": (lambda: own.rlsd_advantages(LOGP, LOGP, LOGP[:, 0], share=2), r"share: got 2, accepted: a number in"),
    "advantages": (lambda: own.rlsd_advantages(LOGP, LOGP, LOGP[0]), r"advantages: got shape \[3\], accepted: one per"),
    "power": (lambda: sft.dft_weights(LOGP, power=-1), "power: got -1, accepted: a number, at least 0"),
    "peak": (lambda: sft.chord_share(1, warm_up=0, decay=1, peak=2, valley=0), r"peak: got 2, accepted: a number in"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
