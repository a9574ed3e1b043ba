"""Rows that trainers have added, beside test_paper.py: each choice of REC, sentences of LPO, the recorded losses of
prime-rl, a cross-entropy term in one pass."""

import itertools
import math

import pytest
import torch
from by_loops import called, clipped, made, ratios, same
from cases import backends_to_test, device_of, interpreted, run
from golden_data import INDEX, arrays

import tokenrl
from tokenrl.objectives.gates.weighted import Rec
from tokenrl.objectives.metrics import RAW

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


def rec_keeps(keep, r, a):
    inside, pushed = 0.9 <= r <= 1.15, r <= 1.15 if a > 0 else r >= 0.9
    far = r <= 0.8 if a > 0 else r >= 1.3
    return {"none": True, "one-side": pushed, "two-side": inside, "ring": inside or far}[keep]


@EVERY_BACKEND
def test_rec(backend):
    """Its three weights and four choices of tokens; the interpreter, to which each is other numbers, takes two."""
    case, cells = made(5)
    d = ratios(case, cells)
    choices = list(itertools.product(("none", "one-side", "two-side", "ring"), ("none", "ratio", "clipped-ratio")))
    dropped = {}
    for keep, weight in choices[4::6] if interpreted(backend) else choices:
        loss, gradient, out = 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64), [0, 0]
        for cell in cells:
            a, r = case["advantages"][cell[0]].item(), math.exp(d[cell])
            kept = rec_keeps(keep, r, a) if a else True
            out[r > 1] += not kept
            w = {"none": 1.0, "ratio": r, "clipped-ratio": min(max(r, 0.8), 1.3)}[weight] * kept
            loss -= w * a * case["logp"][cell].item() / len(cells)
            gradient[cell] = -w * a / len(cells)
        gate = Rec(0.1, 0.15, 0.2, 0.3, keep=keep, weight=weight)
        found = called(tokenrl.objective("rec", gate=gate), case, backend)
        same(found, loss, gradient)
        assert [found[2].clip_low, found[2].clip_high] == pytest.approx([n / len(cells) for n in out])
        dropped[keep] = sum(out)
    if not interpreted(backend):
        assert 0 == dropped["none"] < dropped["one-side"] < dropped["ring"] < dropped["two-side"]


def test_rec_weighed_by_the_ratio_has_the_gradient_of_ppo():
    case, _ = made(3)
    found, ppo = (called(row, case, "reference")[1] for row in (tokenrl.objective("rec", weight="ratio"), "ppo"))
    torch.testing.assert_close(found, ppo, rtol=1e-12, atol=1e-15)


def test_rec_of_sequences():
    """Trinity's gspo-one-side: one ratio, the geometric mean, for all tokens of a row."""
    case, cells = made(6)
    d, gradient = ratios(case, cells), torch.zeros(case["mask"].shape, dtype=torch.float64)
    rows = {i: [d[cell] for cell in cells if cell[0] == i] for i, _ in cells}
    for i, j in cells:
        r, a = math.exp(sum(rows[i]) / len(rows[i])), case["advantages"][i].item()
        gradient[i, j] = -a * r * (r <= 1.02 if a > 0 else r >= 0.98) / len(rows[i]) / len(rows)
    row = tokenrl.objective(
        "rec", statistic="span_mean", weight="ratio", eps_low=0.02, eps_high=0.02, aggregation="seq-mean-token-mean"
    )
    found = called(row, case, "reference")[1]
    torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-14)
    assert found.any()


@EVERY_BACKEND
def test_lpo(backend):
    """Each token carries the geometric mean of its sentence's ratios, clipped as PPO, which moves with all of them."""
    case, cells = made(4)
    sentence = torch.arange(case["mask"].shape[1]).expand_as(case["mask"]) // 5
    case["old_logp"] = case["logp"] - (case["logp"] - case["old_logp"]) / 5
    d, gradient, loss, active = ratios(case, cells), torch.zeros(case["mask"].shape, dtype=torch.float64), 0.0, 0
    spans = {}
    for i, j in cells:
        spans.setdefault((i, j // 5), []).append((i, j))
    for (i, _), span in spans.items():
        r = math.exp(math.fsum(d[cell] for cell in span) / len(span))
        value, slope = clipped(r, case["advantages"][i].item(), 0.97, 1.03)
        loss += value * len(span) / len(cells)
        active += slope == 0
        for cell in span:
            gradient[cell] = slope / len(cells)
    assert 0 < active < len(spans)
    same(called("lpo", case, backend, segment_ids=sentence.to(device_of(backend))), loss, gradient)


@pytest.mark.parametrize("case", INDEX["prime_rl_loss"]["cases"])
def test_prime_rl_as_recorded(case):
    x, recorded = arrays("prime_rl_loss", case), INDEX["prime_rl_loss"]["cases"][case]
    config = recorded["config"]
    if config["type"] == "ipo":
        row = tokenrl.objective(
            "prime_rl_ipo", **dict.fromkeys(("eps_low", "eps_high", "eps_back"), config["ipo_threshold"])
        )
    else:
        row = tokenrl.objective("prime_rl", eps_low=config["dppo_mask_low"], eps_high=config["dppo_mask_high"])
    given = {
        "logp": x["logp"], "old_logp": x["rollout_logp"], "advantages": config["adv_tau"] * x["advantages"],
        "mask": x["mask"], "cu_seqlens": torch.tensor([0, len(x["logp"])]),
    }  # fmt: skip
    if "loss_weights" in x:
        given["token_weight"] = x["loss_weights"]
    how = {"aggregation": "token-sum", "advantages_per": "token"}
    row = tokenrl.objective(row, kl_tau=config["kl_tau"])
    for backend in backends_to_test():
        loss, gradient, raw = run(row, given, backend, torch.float64, **how)
        torch.testing.assert_close(loss, x["loss"].double(), rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(gradient, x["grad_logp"].double(), rtol=1e-13, atol=1e-15)
        tokens, low, high = (raw[RAW.index(name)].item() for name in ("tokens", "clip_low", "clip_high"))
        assert (low + high) / tokens == pytest.approx(recorded["metrics"]["is_masked"])


@EVERY_BACKEND
def test_cross_entropy_of_other_tokens_in_one_pass(backend):
    """ECHO: -0.1 logp of a tool's tokens over their own count beside PPO over its own, and VAPO on tokens of both."""
    case, cells = made(7)
    tool = torch.arange(case["mask"].shape[1]).expand_as(case["mask"]) % 3 == 0
    tools, own = (case["mask"] & tool).sum().item(), (case["mask"] & ~tool).sum().item()
    case["advantages"] = torch.where(tool, 0.0, case["advantages"][:, None])
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    right = case["advantages"] > 0
    for cell in cells:
        value, slope = clipped(math.exp(d[cell]), case["advantages"][cell].item())
        c = 0.1 / tools if tool[cell] else 0.3 / (case["mask"] & right).sum().item() if right[cell] else 0.0
        loss += value / own - c * case["logp"][cell].item()
        gradient[cell] = slope / own - c
    echo = tokenrl.sft_weights.nll_weights(case["mask"] & tool, coef=0.1)
    vapo = tokenrl.sft_weights.nll_weights(case["mask"] & right, coef=0.3, count=(case["mask"] & right).sum())
    row = tokenrl.objective("rmt", ntp=(echo + vapo).to(device_of(backend)), ntp_reduction="sum")
    same(called(row, case, backend, normalizer=float(own)), loss, gradient)


def test_weights_of_cross_entropy():
    nll_weights = tokenrl.sft_weights.nll_weights
    tokens = torch.tensor([[True, False], [True, True]])
    assert nll_weights(tokens, coef=0.3, count=10).tolist() == [[0.03, 0], [0.03, 0.03]]
    assert not nll_weights(tokens & False, coef=0.3).any() and nll_weights(tokens, coef=0.3).dtype == torch.float64
    for call, message in (
        (lambda: nll_weights(tokens.long(), coef=0.3), "tokens: got dtype torch.int64, accepted: torch.bool"),
        (lambda: nll_weights(tokens, coef="0.3"), "coef: got"),
        (lambda: nll_weights(tokens, coef=0.3, count=-1), "count: got -1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
