"""What hosts presume of a loss, tried on every row that they could feed."""

import pytest
import torch

import tokenrl
from tokenrl.integrations import probes
from tokenrl.integrations.hosts import needed_by

ROWS = [row for row in tokenrl.OBJECTIVES.values() if not needed_by(row)]


def test_which_rows_are_linear_in_the_advantages():
    refused = {row.name for row in ROWS if not probes.scales_with_advantages(row)}
    assert refused == {"dro", "kimi15", "prime_rl", "prime_rl_ipo", "clip_cov", "kl_cov"} and len(ROWS) > 30
    assert probes.scales_with_advantages(tokenrl.objective("dro", beta=0.0))  # it is the row that is tried


def test_which_rows_add_up_over_sequences():
    assert {row.name for row in ROWS if not probes.adds_up_over_sequences(row)} == {"clip_cov", "kl_cov"}


@pytest.mark.parametrize("probe", [probes.scales_with_advantages, probes.adds_up_over_sequences])
def test_trying_a_row_leaves_the_generator_alone(probe):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        probe(tokenrl.objective("clip_cov", fraction=0.1))
    assert torch.equal(torch.get_rng_state(), before)
