"""Wrong calls of preference_loss and wrong rows: the error names the argument."""

import dataclasses

import pytest
import torch
from preference_cases import P, T, batch

import tokenrl
from tokenrl.objectives.scores import JsScore

WRONG = [
    ("dpo", {"ref_logp": None}, "^ref_logp: got None, accepted: one; objective 'dpo' needs it"),
    ("simpo", {"ref_logp": torch.zeros(2 * P, T)}, "^ref_logp: got one, accepted: None; objective 'simpo'"),
    ("dpo", {"divergence": torch.zeros(2 * P, T)}, "^divergence: got one, accepted: None"),
    ("tdpo1", {"divergence": None}, "^divergence: got None"),
    ("kto", {"kl": None}, "^kl: got None"),
    ("kto", {"desirable": torch.ones(2 * P)}, "^desirable: got dtype torch.float32"),
    ("kto", {"kl": torch.zeros(2, 2, dtype=torch.float64)}, r"^kl: got shape \[2, 2\]"),
    ("apo_zero_unpaired", {"kl": 0.1}, "^kl: got one"),
    ("kto", {"pairs": torch.zeros(1, 2, dtype=torch.int64)}, "^pairs: got one"),
    ("dpo", {"pairs": torch.tensor([[0, 6]])}, "^pairs: got 0 to 6, accepted: numbers of sequences, 0 to 5"),
    ("dpo", {"pairs": torch.zeros(2, 3, dtype=torch.int64)}, r"^pairs: got shape \[2, 3\]"),
    ("dpo", {"pair_weight": torch.ones(2)}, r"^pair_weight: got \[2\]"),
    ("aot", {"pair_weight": torch.ones(P)}, "^pair_weight: got one"),
    ("dpo", {"nll_mask": torch.ones(2 * P, T, dtype=torch.bool)}, "^nll_mask: got one"),
    ("dpo", {"normalizer": 0}, "^normalizer: got 0, accepted: a number above 0"),
    ("dpo", {"ref_logp": torch.zeros(2 * P, T, requires_grad=True)}, "^ref_logp: got a tensor that requires grad"),
    ("dpq", {}, "^objective: got 'dpq'.*Did you mean 'dpo'"),
    ("dpo", {"mask": None, "logp": torch.zeros(3, T), "ref_logp": torch.zeros(3, T)}, "^pairs: got None.* no halves"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_calls(name, change, message):
    case = batch(name if name in tokenrl.PREFERENCES else "dpo") | change
    with pytest.raises(ValueError, match=message):
        tokenrl.preference_loss(name, **case)


def test_wrong_rows():
    for name, change, message in (
        ("dpo", {"beta": 0}, "^beta: got 0, accepted: a number above 0"),
        ("dpo_robust", {"label_smoothing": 0.5}, r"^label_smoothing: got 0.5, accepted: a number in \[0, 0.5\)"),
        ("exo", {"label_smoothing": 0}, "^label_smoothing: got 0"),
        ("dpo", {"gama": 1}, "^parameter of 'dpo': got 'gama'.*Did you mean 'gamma'"),
        ("kto", {"coupling": "pairs"}, "^coupling: got 'pairs'"),
        ("nca", {"score": JsScore()}, "^score: got JsScore"),
        ("aot", {"score": JsScore()}, "^score: got JsScore"),
        ("dpo", {"statistic": "median"}, "^statistic: got 'median'"),
        ("dpo", {"link": "sigmoid"}, "^link: got 'sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenrl.preference(name, **change)
    row = tokenrl.preference("dpo", beta=0.3, nll=0.1)
    assert row.link.beta == 0.3 and row.nll == 0.1 and tokenrl.PREFERENCES["dpo"].link.beta == 0.1
    assert dataclasses.replace(row, name="mine") is not row and tokenrl.preference(row) is row
