"""token_selection: recorded outputs of ssToken and RSR, masks in loops, layouts, critical scores, errors."""

import math

import pytest
import torch
from golden_data import near
from golden_preference import alike, cases, read, spoiled
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenrl
from tokenrl import token_selection as selection

B, T = 4, 9
DRAW = torch.Generator().manual_seed(0)
MASK = torch.rand(B, T, generator=DRAW) > 0.3
MASK[:, 2], MASK[3] = True, False


def draw(*more):
    """A few values, so that there are ties."""
    return -torch.randint(1, 9, (B, T, *more), generator=DRAW).double() / 4


LOGP, OTHER, ATTENTION = draw(), draw(), draw()
BOUNDARIES = torch.cat([torch.zeros(1, dtype=torch.int64), MASK.sum(1).cumsum(0)])


@cases("sstoken")
def test_sstoken(case):
    """Mask, loss and gradient of the authors' step."""
    x, config = read("sstoken", case)
    labels, logits = x["labels"][:, 1:], x["logits"].requires_grad_()
    mask, prompt = labels != -100, (x["labels"] == -100) & (x["attention_mask"] == 1)
    attention = torch.where(prompt[:, None], x["attn"], 0).sum(-1)[:, 1:]
    logp = tokenrl.token_logprobs(logits[:, :-1], labels.clamp(min=0), outputs=["logp"]).logp
    kept = torch.cat([
        selection.sstoken_mask(*(y[i : i + 1] for y in given), gamma=gamma, rho=config["rho"], mask=mask[i : i + 1])
        for i, gamma in enumerate(x["effective_gamma"].tolist())
        for given in [[spoiled(y, mask) for y in (logp.detach(), -x["history_loss"][:, 1:], attention)]]
    ])  # fmt: skip
    assert torch.equal(kept, x["kept_labels"][:, 1:] != -100) and (kept != mask).any()
    loss, _ = tokenrl.sft_loss(logp, mask=kept)
    alike(loss, x, logits)


@cases("rsr")
def test_rsr(case):
    x, config = read("rsr", case)
    stats = tokenrl.token_logprobs(x["logits"], x["targets"], outputs=["logp", "rank"])
    assert torch.equal(stats.rank.clamp(max=config["r_max"]), x["rank"])
    near(stats.logp, -x["nll"], "logp")
    boundaries = torch.searchsorted(x["sample_id"], torch.arange(len(x["sample_rsr"]) + 1))
    how = {"r_max": config["r_max"], "cu_seqlens": boundaries}
    near(selection.rank_surprisal_ratio(stats.logp, stats.rank, **how), x["sample_rsr"], "of samples")
    near(selection.rank_surprisal_ratio(stats.logp, stats.rank, per="data", **how), x["dataset_rsr"], "of the data")
    of_tokens = selection.rank_surprisal_ratio(stats.logp, stats.rank, per="token", **how)
    near(of_tokens, x["rank"] / x["nll"], "of tokens")


def kept_by_hand(score, pools, count):
    kept = torch.zeros(B, T, dtype=torch.bool)
    for pool in pools:
        best = sorted(pool, key=lambda at: (-score[at].item(), at))
        for at in best[: count(len(pool))]:
            kept[at] = True
    return kept


ROWS = [[(i, t) for t in range(T) if MASK[i, t]] for i in range(B)]
POOLS = {"sequence": [pool for pool in ROWS if pool], "batch": [sum(ROWS, [])]}
COUNTS = {"ceil": math.ceil, "floor": lambda x: max(1, math.floor(x))}


@pytest.mark.parametrize("scope", POOLS)
@pytest.mark.parametrize("rounding", COUNTS)
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_masks_in_loops(share, rounding, scope):
    """Ties by the first token."""
    how = {"share": share, "scope": scope, "rounding": rounding}
    expected = kept_by_hand(OTHER - LOGP, POOLS[scope], lambda n: COUNTS[rounding](share * n))
    assert torch.equal(selection.rho1_mask(spoiled(LOGP, MASK), OTHER, **how, mask=MASK), expected)
    assert torch.equal(selection.top_mask(spoiled(OTHER - LOGP, MASK).float(), **how, mask=MASK), expected)


def test_a_share_is_not_rounded_up_by_its_rounding_error():
    """0.7 of 10 is 7.000000000000001 and 0.29 of 100 is 28.999999999999996 to Python."""
    score = torch.arange(110.0)
    boundaries = torch.tensor([0, 10, 110])
    for share, rounding, expected in ((0.7, "ceil", [7, 70]), (0.29, "floor", [2, 29])):
        kept = selection.top_mask(score, share=share, rounding=rounding, cu_seqlens=boundaries)
        assert [int(part.sum()) for part in kept.split([10, 100])] == expected


def test_infinite_scores_are_scores():
    score = torch.tensor([[-torch.inf, 1.0, -torch.inf, torch.inf]])
    mask = torch.tensor([[True, False, True, True]])
    assert selection.top_mask(score, share=0.5, mask=mask).tolist() == [[True, False, False, True]]


CALLS = {
    "sstoken": lambda x, **how: selection.sstoken_mask(x(LOGP), x(OTHER), x(ATTENTION), **how),
    "attention alone": lambda x, **how: selection.sstoken_mask(x(LOGP), None, x(ATTENTION), gamma=0, **how),
    "excess alone": lambda x, **how: selection.sstoken_mask(x(LOGP), x(OTHER), gamma=1, **how),
    "rho1": lambda x, **how: selection.rho1_mask(x(LOGP), x(OTHER), **how),
    "rsr": lambda x, **how: selection.rank_surprisal_ratio(x(LOGP), x(RANKS), r_max=50, **how),
    "rsr of the data": lambda x, **how: selection.rank_surprisal_ratio(x(LOGP), x(RANKS), per="data", **how),
    "rsr of tokens": lambda x, **how: selection.rank_surprisal_ratio(x(LOGP), x(RANKS), per="token", **how),
}
RANKS = torch.randint(1, 99, (B, T), generator=DRAW)


@pytest.mark.parametrize("name", CALLS)
def test_packed_is_padded(name):
    def masked(x):
        return spoiled(x, MASK) if x.is_floating_point() else torch.where(MASK, x, -5)

    expected = CALLS[name](masked, mask=MASK)
    found = CALLS[name](lambda x: x[MASK], cu_seqlens=BOUNDARIES)
    assert not expected.requires_grad
    if expected.shape == MASK.shape:
        assert expected[MASK].any() and not expected[~MASK].any()
        expected = expected[MASK]
    torch.testing.assert_close(found, expected, equal_nan=True)
    if name == "rsr":
        assert expected.isnan().tolist() == [False, False, False, True]  # of no token there is no ratio


@pytest.mark.parametrize("name", CALLS)
def test_no_number_is_read(name):
    """Fake tensors have none: whatever waits for a device raises."""
    taken = {id(x): x[MASK] for x in (LOGP, OTHER, ATTENTION, RANKS)}
    with FakeTensorMode() as mode:
        found = CALLS[name](mode.from_tensor, mask=mode.from_tensor(MASK))
        packed = CALLS[name](lambda x: mode.from_tensor(taken[id(x)]), cu_seqlens=mode.from_tensor(BOUNDARIES))
    assert found.dim() == packed.dim() + (found.shape == MASK.shape)


def test_the_score_by_hand():
    """Of one sequence, and of one token, which is always kept."""
    gained = (LOGP - OTHER)[0][MASK[0]]
    score = 0.3 * (gained - gained.min()) / (gained.max() - gained.min() + 1e-8) + 0.7 * ATTENTION[0][MASK[0]]
    kept = selection.sstoken_mask(LOGP[:1], OTHER[:1], ATTENTION[:1], gamma=0.3, rho=0.4, mask=MASK[:1])
    best = score.argsort(descending=True, stable=True)[: math.ceil(0.4 * len(score))]
    assert sorted(best.tolist()) == kept[0][MASK[0]].nonzero()[:, 0].tolist()
    assert selection.sstoken_mask(LOGP[:1, :1], OTHER[:1, :1], ATTENTION[:1, :1]).all()
    nothing = torch.zeros(0, dtype=torch.float64)
    assert selection.sstoken_mask(nothing, nothing, nothing, cu_seqlens=torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize("case", ["score_small", "score_v211"])
def test_critical_scores(case):
    x, config = read("cdpo", case)
    ids = x["input_ids"][None, 1:]
    pos, neg = x["pos_logits"][:, :-1], x["neg_logits"][:, :-1]
    near(selection.critical_scores(pos, neg, ids, lam=config["lam"])[0], x["cd_prob"], "score")
    keep = torch.arange(ids.shape[1])[None] > 0
    found = selection.critical_scores(torch.where(keep[..., None], pos, torch.nan), neg, ids, row_mask=keep)
    near(found[0], torch.where(keep[0], x["cd_prob"], 0), "masked")
    ignored = torch.where(keep, ids, -100)
    assert torch.equal(selection.critical_scores(pos, neg, ignored), selection.critical_scores(pos, neg, ids) * keep)
    out = pos.clone()
    out[..., 0] = -torch.inf
    near(
        selection.critical_scores(out, torch.where(out == -torch.inf, out, neg), ids)[0],
        torch.where(out == -torch.inf, out, 2 * pos - neg).softmax(-1).gather(-1, ids[..., None])[0, :, 0], "padding",
    )  # fmt: skip


@pytest.mark.parametrize("shared", [False, True])
def test_critical_scores_from_hidden_states(shared):
    g = torch.Generator().manual_seed(1)
    pos, neg = torch.randn(2, B, T, 5, generator=g, dtype=torch.float64)
    heads = torch.randn(2, 13, 5, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 13, (B, T), generator=g)
    weight, other = heads[0], heads[0] if shared else heads[1]
    weight.requires_grad_()
    expected = selection.critical_scores(pos @ weight.t(), neg @ other.t(), ids, lam=0.5, row_mask=MASK)
    hidden = torch.where(MASK[..., None], pos, torch.nan)
    other = weight if shared else other
    by_mask = selection.linear_critical_scores(hidden, weight, neg, other, ids, lam=0.5, row_mask=MASK)
    by_ids = selection.linear_critical_scores(hidden, weight, neg, other, torch.where(MASK, ids, -100), lam=0.5)
    assert torch.equal(by_ids, by_mask)
    found = by_mask
    near(found, expected, "score")
    assert not found.requires_grad and not found[~MASK].any() and found[MASK].all()


ERRORS = {
    "share": (lambda: selection.top_mask(LOGP, share=0), "share: got 0, accepted: the fraction of tokens to keep"),
    "rounding": (lambda: selection.top_mask(LOGP, share=1, rounding="round"), "rounding: got 'round', accepted: ceil"),
    "scope": (lambda: selection.rho1_mask(LOGP, OTHER, scope="sample"), "scope: got 'sample', accepted: sequence"),
    "history": (lambda: selection.sstoken_mask(LOGP, None, LOGP), r"history_logp: got None, .*\[4, 9\]; gamma is 0.5"),
    "attention": (lambda: selection.sstoken_mask(LOGP, OTHER), "attention: got None, accepted: one number per token"),
    "gradient": (
        lambda: selection.rho1_mask(LOGP.clone().requires_grad_(), OTHER), "logp: got a tensor that requires grad"
    ),
    "shape": (lambda: selection.rho1_mask(LOGP, OTHER[1:]), r"ref_logp: got shape \[3, 9\], accepted: one value per"),
    "rank": (lambda: selection.rank_surprisal_ratio(LOGP, LOGP), "rank: got dtype torch.float64, accepted: integers"),
    "per": (lambda: selection.rank_surprisal_ratio(LOGP, RANKS, per="set"), "per: got 'set', accepted: sequence"),
    "lam": (lambda: selection.critical_scores(LOGP[..., None], LOGP[..., None], RANKS, lam=-1), "lam: got -1"),
    "logits": (lambda: selection.critical_scores(draw(2), draw(3), RANKS), r"neg_logits: got \[4, 9, 3\] on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
