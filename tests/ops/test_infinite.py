"""Infinite log ratios and log-probs of -inf: whatever has no part in the loss has none in its gradient either.

0 times infinity is NaN to a machine and 0 to every formula here: no advantage, no weight, a bound that has been met.
"""

import itertools
import math

import pytest
import torch
from cases import (
    PAIRS,
    backends_to_test,
    device_of,
    gates_under_test,
    interpreted,
    kernel_backends,
    on_backends,
    run,
    thinned,
)

import tokenrl
from tokenrl.objectives.forms.weights import KlCov
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.adaptive import Dhpo, DhpoBranch
from tokenrl.objectives.gates.bounded import PpoNtp, PrimeRl
from tokenrl.objectives.gates.kl import KlK3
from tokenrl.objectives.gates.weighted import Quadratic

INF = math.inf
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
SILENT = {name: gate for name, gate in gates_under_test().items() if gate.uses_advantages and gate.vanishes}
SILENT |= {"ppo_ntp": PpoNtp(ntp=0.0), "quadratic": Quadratic(beta=0.0), "prime_rl": PrimeRl(kl_tau=0.0)}
DTYPES = (torch.float32, torch.float64)


def filled(rows, columns, odd, advantages):
    """Log-probs of -2, but of the tokens `odd`: (row, column, tensor) -> value."""
    case = {name: torch.full((rows, columns), -2.0, dtype=torch.float64) for name in ("logp", "old_logp")}
    for (row, column, name), value in odd.items():
        case[name][row, column] = value
    return case | {"advantages": torch.tensor(advantages, dtype=torch.float64)}


def agree(found, expected):
    for got, right in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-7)


def grids():
    """Every statistic and flow of each gate on the CPU; elsewhere they take turns, one or a third for each gate."""
    for backend in backends_to_test():
        for k, name in enumerate(SILENT):
            step = 1 if backend == "cpu" else len(PAIRS) if interpreted(backend) else 3
            pairs = PAIRS[k % step :: step]
            yield from ((name, *pair, backend) for pair in pairs)


@pytest.mark.parametrize("name,statistic,flow,backend", list(grids()))
def test_a_row_without_advantage_has_no_part(name, statistic, flow, backend):
    row = tokenrl.Objective(
        "made", statistic, SILENT[name], "seq-mean-token-mean", "test", flow=flow, clamp=INF, cap=INF
    )
    for dtype in DTYPES:
        expected = run(row, filled(2, 3, {}, [1.0, 0.0]), backend, dtype)
        for odd in ({(1, 1, "old_logp"): -INF}, {(1, 1, "logp"): -INF}, {(1, 0, "old_logp"): -1e4}):
            agree(run(row, filled(2, 3, odd, [1.0, 0.0]), backend, dtype), expected)


# REAL: A = 0 is a label. FiberPO-Domain: the aggregates of a row enter the ratios of its group.
COUPLED = ("real", "fiberpo_domain")


@on_backends([n for n, r in tokenrl.OBJECTIVES.items() if r.gate.name in SILENT and n not in COUPLED], start=1)
def test_nor_has_it_in_any_row_of_the_table(name, backend):
    row = tokenrl.OBJECTIVES[name]
    if isinstance(row.form, KlCov):
        row = tokenrl.objective(row, coef=0.0)  # the penalty holds tokens of any advantage
    off = {"quadratic": {"beta": 0.0}, "prime_rl": {"kl_tau": 0.0}}  # pulls that ask for no advantage
    row = tokenrl.objective(row, **off.get(row.gate.name, {}))
    groups = {"group_ids": torch.zeros(2, dtype=torch.int64)}
    expected = run(row, filled(2, 3, {}, [1.0, 0.0]) | groups, backend, torch.float32)
    for odd in ({(1, 1, "old_logp"): -INF, (1, 2, "old_logp"): -202.0}, {(1, 1, "logp"): -INF}):
        agree(run(row, filled(2, 3, odd, [1.0, 0.0]) | groups, backend, torch.float32), expected)


CLIPPED = [name for name in gates_under_test() if name in ("ppo_clip", "log_band", "sapo", "hapo", "ppo_ntp")]
CLIPPED_PAIRS = [pair for pair in PAIRS if not pair[0].startswith("prefix_min")]


@EVERY_BACKEND
@pytest.mark.parametrize("name", CLIPPED)
def test_a_bound_hides_an_infinite_ratio(name, backend):
    """As it hides a large one: above for A > 0, and below for either sign."""
    gate = gates_under_test()[name]
    pairs = CLIPPED_PAIRS if not interpreted(backend) else CLIPPED_PAIRS[CLIPPED.index(name) :][:2]
    for statistic, flow in pairs:
        row = tokenrl.Objective("made", statistic, gate, "seq-mean-token-mean", "test", flow=flow, clamp=INF, cap=INF)
        for tensor, advantage in (("old_logp", 1.0), ("logp", 1.0), ("logp", -1.0)):
            if name == "ppo_ntp" and tensor == "logp":
                continue  # the next token's loss is infinite
            far, infinite = (filled(1, 4, {(0, 1, tensor): x}, [advantage]) for x in (-200.0, -INF))
            for dtype in DTYPES:
                with_far = run(row, far, "reference", torch.float64)
                agree(run(row, infinite, backend, dtype), [y.to(dtype) for y in with_far])


@EVERY_BACKEND
@pytest.mark.parametrize("gate", [Dhpo, DhpoBranch])
@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
def test_so_do_those_of_a_mixture(gate, mix, backend):
    row = tokenrl.objective("dhpo", gate=gate(mix=mix), clamp=INF)
    for tensor, advantage in (("old_logp", 1.0), ("logp", 1.0), ("logp", -1.0)):
        far, infinite = (filled(1, 4, {(0, 1, tensor): x}, [advantage]) for x in (-200.0, -INF))
        agree(run(row, infinite, backend, torch.float64), run(row, far, "reference", torch.float64))


@EVERY_BACKEND
@pytest.mark.parametrize("name", [*CLIPPED, "ratio", "reinforce", "vespo", "kl_k2", "identity"])
def test_a_weight_of_zero_hides_everything(name, backend):
    row = tokenrl.Objective("made", "token", gates_under_test()[name], "token-mean", "test", clamp=INF)
    weight = {"token_weight": torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)}
    expected = run(row, filled(1, 3, {}, [-1.0]) | weight, backend, torch.float64)
    for tensor in ("old_logp", "logp"):
        agree(run(row, filled(1, 3, {(0, 1, tensor): -INF}, [-1.0]) | weight, backend, torch.float64), expected)


@EVERY_BACKEND
def test_a_ceiling_hides_an_infinite_divergence(backend):
    row = tokenrl.objective("kl_k3", gate=KlK3(ceiling=10.0), clamp=INF)
    for dtype in DTYPES:
        loss, grad, _ = run(row, filled(1, 4, {(0, 1, "logp"): -INF}, [0.0]), backend, dtype)
        assert loss == 2.5 and grad.count_nonzero() == 0


@EVERY_BACKEND
def test_a_coefficient_of_zero_hides_an_infinite_penalty(backend):
    case = filled(1, 3, {}, [-1.0])
    expected = run("ppo", case, backend, torch.float64)
    far = {"ref_logp": torch.full((1, 3), -INF, dtype=torch.float64)}
    agree(run("ppo", case | far, backend, torch.float64, kl=tokenrl.objective("kl_k2", clamp=INF)), expected)


LENGTHS = list(  # within a vector; longer; longer than a block
    itertools.product([10, 40, 1100], ["gspo", "luspo", "sspo", "gmpo", "ctpo", "ctpo_geomean_fixed"])
)


@pytest.mark.parametrize("columns,name,backend", [(*c, b) for b in kernel_backends() for c in thinned(LENGTHS, b)])
def test_rows_of_any_length(columns, name, backend):
    """47: the lower half of a running sum was inf - inf."""
    row = tokenrl.objective(name, clamp=INF)
    for tensor, advantage in (("old_logp", 1.0), ("logp", 1.0), ("logp", -1.0)):
        case = filled(1, columns, {(0, 2, tensor): -INF}, [advantage])
        expected = run(row, case, "reference", torch.float64)
        assert expected[0].isfinite() and expected[1].isfinite().all()
        for dtype in DTYPES:
            agree(run(row, case, backend, dtype), [y.to(dtype) for y in expected])


@EVERY_BACKEND
@pytest.mark.parametrize("kind", ["sum", "mean", "min"])
def test_prefix_ratios(kind, backend):
    device = device_of(backend)
    for columns in (10, 40, 1100):
        x = torch.zeros(1, columns)
        x[0, 2] = -INF
        found = tokenrl.prefix_ratio(x.to(device), torch.zeros_like(x).to(device), kind=kind, backend=backend)
        assert (found[0, :2] == 0).all() and (found[0, 2:] == -INF).all()


@EVERY_BACKEND
def test_from_hidden_states_as_from_its_log_probs(backend):
    """linear_policy_loss leaves rows without an advantage out, policy_loss computes them."""
    device = device_of(backend)
    hidden, weight = torch.zeros(1, 2, 4, device=device), torch.zeros(9, 4, device=device)
    ids, old = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.full((1, 2), -300.0, device=device)
    none = torch.zeros(1, device=device)
    logp, _ = tokenrl.linear_token_logprobs(hidden, weight, ids, backend=backend)
    assert tokenrl.linear_policy_loss("gspo", hidden, weight, ids, old, none, backend=backend)[0] == 0
    assert tokenrl.policy_loss("gspo", logp, old, none, backend=backend)[0] == 0


def test_every_gate_without_a_loss_where_there_is_no_advantage_is_tried():
    assert set(SILENT) | {gate.name for gate in GATES.values() if not gate.uses_advantages} == set(GATES)
