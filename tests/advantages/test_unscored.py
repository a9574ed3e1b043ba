"""Rewards that nobody gave, NaN: an error that names them, or the statistics of the scored rows alone."""

import pytest
import torch
from advantage_cases import IDS, LENGTHS, REWARDS, of, same

from tokenrl import advantages as adv

UNSCORED = torch.tensor([0, 1, 3, 11])  # of groups of four and three, one alone, one of a pair
SCORED = torch.tensor([i not in UNSCORED for i in range(len(IDS))])
DRAW = torch.Generator().manual_seed(0)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
MASK &= torch.rand(MASK.shape, generator=DRAW) < 0.8
TOKENS = torch.randint(0, 3, MASK.shape, generator=DRAW)
VALUES, LOGP, SQUARES = torch.rand(3, *MASK.shape, dtype=torch.float64, generator=DRAW)


def broken():
    return of(REWARDS).masked_fill(~SCORED, torch.nan)


def on_tokens(rewards, mask):
    """The reward stands on the row's last valid token."""
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last, rewards[:, None], 0.0)


# (rewards, rows): the estimator on those rows of the batch.
PER_ROW = {
    "grpo": lambda x, at, **o: adv.grpo(x, ids(at), **o),
    "grpo, batch": lambda x, at, **o: adv.grpo(x, ids(at), scale="batch", **o),
    "rloo": lambda x, at, **o: adv.rloo(x, ids(at), **o),
    "opo": lambda x, at, **o: adv.opo(x, torch.tensor(LENGTHS)[at], ids(at), **o),
    "gpg": lambda x, at, **o: adv.gpg(x, ids(at), **o),
    "maxrl": lambda x, at, **o: adv.maxrl(x, ids(at), **o),
    "soft_value": lambda x, at, **o: adv.soft_value(x, ids(at), **o),
    "opmd": lambda x, at, **o: adv.opmd(x, ids(at), baseline="soft", **o),
    "asymre": lambda x, at, **o: adv.asymre(x, ids(at), **o),
    "pass_at_k": lambda x, at, **o: adv.pass_at_k(x, ids(at), **o),
    "hapo": lambda x, at, **o: adv.hapo(x, torch.tensor(LENGTHS)[at], ids(at), limit=1.1, **o),
    "gdpo": lambda x, at, **o: adv.gdpo(torch.stack([x, of(REWARDS).flip(0)[at]], 1), ids(at), **o),
    "gdpo over tokens": lambda x, at, **o: adv.gdpo(x[:, None], ids(at), lengths=torch.tensor(LENGTHS)[at], **o),
    "group_statistics": lambda x, at, **o: adv.group_statistics(x, ids(at), **o).std,
    "hapo_statistics": lambda x, at, **o: adv.hapo_statistics(x, torch.tensor(LENGTHS)[at], ids(at), **o).mean,
}
PER_TOKEN = {
    "baseline": lambda x, at, **o: adv.reinforce_plus_plus_baseline(x, ids(at), MASK[at], **o),
    "tempo": lambda x, at, **o: adv.tempo(x, ids(at), TOKENS[at], MASK[at], **o),
    "whiten": lambda x, at, **o: adv.whiten(x[:, None].expand(-1, 7), MASK[at], **o),
    "reinforce_plus_plus": lambda x, at, **o: adv.reinforce_plus_plus(on_tokens(x, MASK[at]), MASK[at], 0.9, **o),
    "gae": lambda x, at, **o: adv.gae(on_tokens(x, MASK[at]), VALUES[at], MASK[at], 0.9, 0.8, **o)[0],
    "gae, holes": lambda x, at, **o: adv.gae(on_tokens(x, MASK[at]), VALUES[at], MASK[at], holes="count", **o)[1],
    "otb": lambda x, at, **o: adv.otb(on_tokens(x, MASK[at]), ids(at), -LOGP[at], SQUARES[at], MASK[at], **o),
}


def ids(at):
    return torch.tensor(IDS)[at]


@pytest.mark.parametrize("name", [*PER_ROW, *PER_TOKEN])
def test_the_statistics_are_those_of_the_scored_rows(name):
    call, everyone = (PER_ROW | PER_TOKEN)[name], torch.ones_like(SCORED)
    found = call(broken(), everyone, unscored="nan")
    same(found[SCORED], call(of(REWARDS)[SCORED], SCORED))
    unknown = ~SCORED if name in PER_ROW else ~SCORED[:, None] & MASK
    assert torch.equal(found.isnan(), unknown)
    same(call(of(REWARDS), everyone, unscored="nan"), call(of(REWARDS), everyone))


@pytest.mark.parametrize("name", [*PER_ROW, *PER_TOKEN])
def test_unscored_rows_raise_by_name(name):
    call, everyone = (PER_ROW | PER_TOKEN)[name], torch.ones_like(SCORED)
    with pytest.raises(ValueError, match="^(token_)?(rewards|values): got NaN in .* accepted: .*unscored='nan'"):
        call(broken(), everyone)
    with pytest.raises(ValueError, match="^unscored: got 'zero', accepted: raise, nan"):
        call(broken(), everyone, unscored="zero")


def test_statistics_of_scored_rows_serve_parts():
    """A part hands in the statistics and gets what the whole gets, NaN for its unscored rows."""
    x, s = broken(), adv.group_statistics(broken(), torch.tensor(IDS), unscored="nan")
    whole = adv.grpo(x, torch.tensor(IDS), unscored="nan")
    for part in (slice(5), slice(5, 12)):
        found = adv.grpo(x[part], mean=s.mean[part], std=s.std[part], unscored="nan")
        torch.testing.assert_close(found, whole[part], rtol=0, atol=0, equal_nan=True)


def test_where_a_look_were_a_sync_a_group_is_nan(monkeypatch):
    monkeypatch.setattr("tokenrl.batch.checks.values_known", lambda x: False)
    found = adv.grpo(broken(), torch.tensor(IDS))
    assert found.isnan().tolist() == [any(IDS[j] == i for j in UNSCORED) for i in IDS]
