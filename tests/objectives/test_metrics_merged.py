"""Metrics of parts of a batch, micro-batches or ranks, against those of the whole."""

import cases
import linear_policy_cases
import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl

PARTS = (slice(0, 2), slice(2, 3), slice(3, 6))


def of_policy(objective, rows, backend, terms):
    """(loss, gradient, metrics) of rows of a batch under the count of the whole."""
    case = cases.batch(1, rows=6, poison=False)
    given = {name: case[name][rows].to(device_of(backend)) for name in ("logp", "old_logp", "advantages", "mask")}
    if terms:
        given |= {"ref_logp": given["old_logp"] - 0.1, "entropy": given["logp"].square()}
    logp = given.pop("logp").requires_grad_()
    coefs = {"kl_coef": 0.1, "entropy_coef": 0.01} if terms else {}
    loss, metrics = tokenrl.policy_loss(
        objective, logp, given.pop("old_logp"), given.pop("advantages"), aggregation="token-mean",
        normalizer=case["mask"].sum().item(), backend=backend, **given, **coefs,
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def of_head(rows, backend):
    case = linear_policy_cases.placed(linear_policy_cases.make(), backend, torch.float64)
    case["advantages"][4] = 0
    of_batch = ("hidden", "ids", "old_logp", "advantages", "mask")
    given = {name: case[name][rows] for name in of_batch} | {"weight": case["weight"], "bias": case["bias"]}
    given["hidden"].requires_grad_()
    normalizer = linear_policy_cases.valid(case).sum()
    loss, metrics = linear_policy_cases.called("gspo", given | {"normalizer": normalizer}, backend)
    return loss.detach(), torch.autograd.grad(loss, given["hidden"])[0], metrics


CALLS = {
    "ppo": lambda rows, backend: of_policy("ppo", rows, backend, False),
    "ctpo": lambda rows, backend: of_policy("ctpo", rows, backend, False),
    "gmpo": lambda rows, backend: of_policy("gmpo", rows, backend, False),
    "terms": lambda rows, backend: of_policy("cispo", rows, backend, True),
    "head": of_head,
}


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", CALLS)
def test_micro_batches_have_the_metrics_of_their_batch(name, backend):
    whole, grad, expected = CALLS[name](slice(0, 6), backend)
    losses, grads, parts = zip(*(CALLS[name](rows, backend) for rows in PARTS), strict=True)
    found = tokenrl.Metrics.merged(parts)
    assert type(found) is type(expected) and found.raw.shape == (len(found.RAW),)
    assert found.as_dict() == pytest.approx(expected.as_dict(), rel=1e-11, abs=1e-14, nan_ok=True)
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-11)
    torch.testing.assert_close(torch.cat(grads), grad, rtol=1e-9, atol=1e-12)
    if name == "head":
        assert found.left_out > 0 and not hasattr(found, "logp") and not hasattr(found, "token_entropy")


def test_most_passes_count():
    def of(passes):
        raw = torch.zeros(16, dtype=torch.float64).index_fill(0, torch.tensor([0, 14]), passes)
        return tokenrl.LinearMetrics(raw, torch.ones(1), torch.ones(1))

    found = tokenrl.Metrics.merged([of(1), of(2), of(1)])
    assert found.passes == 2 and found.tokens == 4


def test_parts_are_checked():
    raw = torch.ones(14, dtype=torch.float64)
    one, other = tokenrl.Metrics(raw[:12]), tokenrl.TermMetrics(raw)
    for parts in ([], one, raw, [one, other], [one, raw[:12]]):
        with pytest.raises(ValueError, match=r"^parts: got .*, accepted: (a list of Metrics|metrics of one class)"):
            tokenrl.Metrics.merged(parts)


def test_without_a_process_group_there_is_nothing_to_reduce():
    """On ranks: the cases of data_cases.py, in tests/distributed."""
    own = CALLS["ppo"](PARTS[0], "reference")[2]
    assert own.reduce() is own
