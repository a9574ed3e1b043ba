"""`tokenrl parity` and assert_parity: backends and losses of others against the fp64 reference."""

import io
import json
import sys
import textwrap

import parity_batches
import pytest
import torch
from cases import interpreted
from parity_batches import BATCHES, saved
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

import tokenrl
from tokenrl import cli
from tokenrl.instruments.parity import assert_parity, random_batch, report, shown
from tokenrl.ops import backends

LOSSES = """
    import torch

    def grpo(logits, ids, old_logp, advantages, mask, temperature, eps_low, eps_high):
        logp = torch.log_softmax(logits / temperature, -1).gather(-1, ids.clamp(min=0)[..., None]).squeeze(-1)
        ratio = torch.exp(torch.where(mask, logp - old_logp, 0))
        clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
        loss = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
        return (loss * mask).sum(1).div(mask.sum(1)).mean(), {"loss": "and what it logs"}

    def off(logits, ids, old_logp, advantages, mask, temperature):
        return 1.001 * grpo(logits, ids, old_logp, advantages, mask, temperature, 0.2, 0.2)[0]

    def raises(logp):
        raise ValueError("inside")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with losses of a user."""
    (tmp_path / "users_losses.py").write_text(textwrap.dedent(LOSSES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("users_losses", None)


def called(*arguments):
    """What the command prints, on a terminal of 80 columns."""
    return CliRunner().invoke(cli.application(), ["parity", *map(str, arguments)], env={"COLUMNS": "80"})


def grpo(logp, old_logp, advantages, mask):
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0))
    a = advantages if advantages.shape == logp.shape else advantages[:, None]
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


BY = {"demo-like": ["logits"], "long": ["logp"], "packed": ["hidden", "weight"], "empty": ["logits"]}


@pytest.mark.parametrize("name", BATCHES)
def test_every_backend_holds(name, tmp_path, monkeypatch):
    quick = {key: backend for key, backend in backends.BACKENDS.items() if name != "long" or not interpreted(key)}
    monkeypatch.setattr(report, "BACKENDS", quick)
    path, batch = saved(name, tmp_path), BATCHES[name]()
    found = json.loads(called(path, "--json").output)
    assert found["held"] and found["valid"] == int(batch.layout.valid().sum())
    ran = [one for one in found["comparisons"] if one["reason"] is None]
    assert {one["way"] for one in ran} >= {"cpu", "reference"} and all(one["held"] for one in ran)
    assert all([error["of"] for error in one["errors"]] == ["loss", *BY[name]] for one in ran)


def test_the_table_has_80_columns():
    done = called("--objective", "ctpo")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80 and "worst token of" in done.output
    for backend in backends.BACKENDS.values():
        reason = backend.why_not(torch.device("cpu"))
        assert (f"{backend.name} cannot run: {reason}" if reason else f"  {backend.name} ") in done.output


@pytest.mark.parametrize("row", ["ctpo_geomean", "gspo", "fiberpo", "fipo", "real", "minpro"])
def test_other_rows_on_long_sequences(row):
    batch = parity_batches.long(row)
    batch.tensors["group_ids"] = torch.tensor([0, 0, 1])
    assert report.of_backends(batch, backend="cpu").held


def test_half_precision_is_compared_beside_fp32():
    batch = random_batch(head="hidden")
    half = {name: batch.tensors[name].bfloat16() for name in ("hidden", "weight")}
    for tensors, dtypes in ((batch.tensors, ["float32"]), (batch.tensors | half, ["float32", "bfloat16"])):
        given = tokenrl.RolloutBatch(tensors, batch.objective, batch.settings, {})
        found = report.of_backends(given, backend="cpu")
        assert [one.dtype for one in found.comparisons] == dtypes and found.held


def test_a_backend_that_is_wrong_is_found(monkeypatch):
    real = tokenrl.RolloutBatch.loss

    def wrong(self, objective=None, *, backend=None, **scores):
        loss, metrics = real(self, objective, backend=backend, **scores)
        return (loss + 1e-4 * self.tensors["logits"][1, 2].sum() if backend == "cpu" else loss), metrics

    monkeypatch.setattr(tokenrl.RolloutBatch, "loss", wrong)
    found = report.of_backends(random_batch(), backend="cpu")
    (one,) = found.comparisons
    assert not found.held and [error.held for error in one.errors] == [False, False]
    valid = random_batch().tensors["mask"][1]
    assert (one.worst.sequence, one.worst.length) == (1, int(valid.sum()))
    assert one.worst.position == int(valid[:3].sum())


def test_a_loss_of_a_user_by_name(folder):
    assert called("--against", "users_losses:grpo").exit_code == 0
    done = called("--against", "users_losses:off")
    assert done.exit_code == 1 and done.output.count("differs") == 2
    error = called("--against", "users_losses:raises").exception
    assert str(error) == "raises raised ValueError: inside" and isinstance(error.__cause__, ValueError)


def test_the_worst_token_is_where_it_is():
    batch = random_batch(1)
    valid = batch.tensors["mask"]

    def off(logp, old_logp, advantages, mask):
        return grpo(logp, old_logp, advantages, mask) + 1e-3 * logp[2, 5]

    (one,) = report.of_loss(report_loss(off), batch).comparisons
    assert (one.worst.sequence, one.worst.position) == (2, int(valid[2, :6].sum()))
    x = (batch.log_probs() - batch.tensors["old_logp"])[2, 5].double()
    assert one.worst.ratio == pytest.approx(x.exp().item(), rel=1e-5)
    edges = torch.tensor([0.8, 1.2]).double().log() - x
    mine = edges[1] if one.worst.advantage > 0 else edges[0]
    assert one.worst.to_edge == pytest.approx(mine.item(), abs=1e-5)


def report_loss(function):
    from tokenrl.instruments.parity.user_loss import user_loss

    return user_loss(function)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_token_at_a_clip_edge_is_named_and_left_out(side):
    batch = random_batch()
    logp = batch.log_probs("reference")
    row, at = 2, int(batch.tensors["mask"][2].nonzero()[3])
    old = batch.tensors["old_logp"].clone()
    old[row, at] = logp[row, at] - torch.tensor(1.2).log()  # A > 0
    batch = tokenrl.RolloutBatch(batch.tensors | {"old_logp": old}, batch.objective, batch.settings, {})
    found = report.of_backends(batch, backend="cpu")
    assert found.held and found.undecided == 1
    (edge,) = found.edges
    assert (edge.sequence, edge.position) == (2, 4) and abs(edge.to_edge) < 1e-6

    def other_side(logits, ids, old_logp, advantages, mask, temperature):
        logp = torch.log_softmax(logits / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)
        moved = torch.zeros_like(logp).index_put((torch.tensor(row), torch.tensor(at)), torch.tensor(side * 1e-6))
        return grpo(logp + moved, old_logp, advantages, mask)

    assert_parity(other_side, batch)
    assert report.of_loss(report_loss(other_side), batch).undecided == 1


def test_a_weight_is_not_compared_where_a_token_is_at_an_edge():
    batch = random_batch(head="hidden")
    old = batch.tensors["old_logp"].clone()
    old[0, 0] = batch.log_probs("reference")[0, 0] - torch.tensor(1.2).log()
    batch = tokenrl.RolloutBatch(batch.tensors | {"old_logp": old}, batch.objective, batch.settings, {})

    def loss(hidden, weight, ids, old_logp, advantages, mask, temperature):
        logp = torch.log_softmax(hidden @ weight.t() / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)
        return grpo(logp, old_logp, advantages, mask)

    loss.__name__ = "a_loss_with_a_long_name"
    found = report.of_loss(report_loss(loss), batch)
    shown.print_report(found, Console(width=80, file=(text := io.StringIO())))
    assert max(map(len, text.getvalue().splitlines())) <= 80 and "…" not in text.getvalue()
    assert "left out" in text.getvalue() and "rounding decides: 1 in float32" in text.getvalue()
    assert found.held and found.comparisons[0].not_compared == ("weight",)
    assert [error.of for error in found.comparisons[0].errors] == ["loss", "hidden"]
    assert report.of_loss(report_loss(loss), random_batch(head="hidden")).comparisons[0].not_compared == ()


def test_what_a_loss_may_take():
    batch = random_batch(kl_coef=0.1)
    seen = {}

    def loss(logp, /, old_logp, *, objective, eps_low, eps_high=7.0, mask=None, unheard_of=3, **rest):
        seen.update(locals())
        return logp.sum(), "more"

    with pytest.raises(AssertionError, match="^loss is not 'grpo' in float32\n  value: L1 error"):
        assert_parity(loss, batch)
    assert seen["eps_low"] == 0.2 and seen["eps_high"] == 7 and seen["unheard_of"] == 3 and seen["rest"] == {}
    assert seen["objective"].name == "grpo" and torch.equal(seen["mask"], batch.tensors["mask"])
    assert torch.equal(seen["old_logp"], batch.tensors["old_logp"]) and seen["logp"].requires_grad


def test_a_loss_that_takes_logits_runs_on_a_batch_of_hidden_states(folder):
    import users_losses

    assert_parity(users_losses.grpo, random_batch(head="hidden"))
    with pytest.raises(AssertionError, match=r"most at sequence \d, token \d+ of \d+, ratio .*, A . 0, .* to the clip"):
        assert_parity(users_losses.off, random_batch(head="hidden"))


def test_a_loss_cannot_change_the_batch():
    batch = random_batch()

    def loss(logp, old_logp, advantages, mask):
        advantages.mul_(2)
        return grpo(logp, old_logp, advantages.div_(2), mask.logical_not_().logical_not())

    before = {name: x.clone() for name, x in batch.tensors.items()}
    assert_parity(loss, batch)
    assert all(torch.equal(x, batch.tensors[name]) for name, x in before.items())


def wrong_kind(logp):
    return float(logp.detach().sum())


ERRORS = {
    "parameter": (lambda logp, advantage: logp.sum(), {}, "parameter of <lambda>: got 'advantage', .* 'advantages'"),
    "not in the batch": (lambda logp, rewards: logp.sum(), {}, "rewards: got None, accepted: a batch that has it"),
    "nothing to differentiate": (
        lambda ids: ids.sum(),
        {},
        "parameters of <lambda>: got ids, accepted: logits",
    ),
    "not a scalar": (lambda logp: logp, {}, r"result of <lambda>: got a torch.Tensor of torch.float32 \[8, 24\]"),
    "no tensor": (wrong_kind, {}, "result of wrong_kind: got .*, a float, accepted: a scalar tensor"),
    "no graph": (lambda logp: logp.detach().sum(), {}, "result of <lambda>: got a tensor without a graph"),
    "no function": (3, {}, "loss: got 3, a int, accepted: a function"),
    "objective": (grpo, {"objective": "grop"}, "objective: got 'grop', .* Did you mean 'grpo'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_loss_is_named(case):
    loss, more, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        assert_parity(loss, random_batch(), **more)


def test_wrong_options_are_named(folder, tmp_path):
    for options, message in {
        ("--against", "users_losses:gpro"): "Did you mean 'grpo'",
        ("--against", "user_losses:grpo"): "Did you mean 'users_losses'",
        ("--against", "users_losses"): "accepted: MODULE:NAME",
        ("--backend", "cpv"): "Did you mean 'cpu'",
        ("--against", "users_losses:grpo", "--backend", "cpu"): "nothing beside --against",
        ("--objective", "ctpoo"): "Did you mean 'ctpo'",
        ("missing.safetensors",): "No such file",
    }.items():
        done = called(*options)
        assert done.exit_code == 1 and message in done.output.replace("\n", " "), (options, done.output)


def test_a_damaged_file_is_named(tmp_path):
    path = saved("demo-like", tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    done = called(path)
    assert done.exit_code == 1 and "damaged" in done.output
    with pytest.raises(ValueError, match="damaged"):
        assert_parity(grpo, path)


def test_the_random_batch_is_what_it_says():
    batch, again, other = random_batch(5), random_batch(5), random_batch(6)
    assert all(torch.equal(x, again.tensors[name]) for name, x in batch.tensors.items())
    assert not torch.equal(batch.tensors["logits"], other.tensors["logits"])
    mask, advantages = batch.tensors["mask"], batch.tensors["advantages"]
    assert (advantages > 0).any() and (advantages < 0).any() and mask.any(1).all()
    assert (mask[:, 1:] & ~mask[:, :-1]).any()
    ratio = (batch.log_probs() - batch.tensors["old_logp"]).exp()[mask]
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and ((ratio > 0.9) & (ratio < 1.1)).any()
    with pytest.raises(ValueError, match="^head: got 'logit', .* Did you mean 'logits'"):
        random_batch(head="logit")


def test_help_has_an_example():
    assert "Example: tokenrl parity batch.safetensors --objective ctpo" in called("--help").output


def test_the_written_file_is_the_batch(tmp_path):
    assert set(load_file(saved("demo-like", tmp_path))) == set(parity_batches.demo_like().tensors)
