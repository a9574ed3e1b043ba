"""tokenrl.profile: what it counts is what there was, and it changes nothing."""

import json

import pytest
import torch

import tokenrl
from tokenrl.instruments.profiling import accounts, lines, tables
from tokenrl.instruments.work import FORMULAS
from tokenrl.ops import divergence_ops, kernel_ops, linear_divergence_ops, linear_ops, ranges

N, D, V = 12, 8, 31
pytestmark = pytest.mark.usefixtures("known_limits")


@pytest.fixture
def head():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, D, generator=g), torch.randn(V, D, generator=g)
    ids = torch.randint(0, V, (2, 6), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def by_what(profile):
    """The lines of level 0 and, under (outer, inner), those inside."""
    found, outer = {}, None
    for line in profile.lines:
        outer = line.what if line.level == 0 else outer
        found[line.what if line.level == 0 else (outer, line.what)] = line
    return found


def test_one_pass_counts_what_it_does(head):
    hidden, weight, ids = head
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 3:] = False
    with tokenrl.profile() as p:
        loss, _ = tokenrl.linear_policy_loss("reinforce", hidden, weight, ids, None, torch.ones(2), mask=mask)
        loss.backward()
    found, n = by_what(p), int(mask.sum())
    forward = found["linear_policy_loss forward"]
    assert (forward.shape, forward.dtype, forward.backend, forward.calls) == ((N, D, V), "fp32", "cpu", 1)
    assert forward.flops == 6 * n * D * V == found["linear_policy_loss forward", lines.PRODUCTS].flops
    assert found["linear_policy_loss forward", lines.PRODUCTS].calls == 3
    read, written = 4 * (n * D + V * D), 4 * (N * D + V * D)
    assert (forward.read, forward.written, forward.exponentials) == (read, written, 2 * n * V)
    inner = found["linear_policy_loss forward", "token_logprobs forward"]
    assert (inner.shape, inner.read, inner.written, inner.exponentials) == ((n, V), 4 * n * V, 0, n * V)
    assert inner.launches == 1 and inner.limit == "exp" and inner.least == n * V / 1e9
    assert forward.limit == "GEMM" and forward.least == forward.flops / 5e9
    assert found["linear_policy_loss backward"].bytes == 2 * 4 * (N * D + V * D)


def test_rows_that_are_not_read_are_not_counted(head):
    logits = torch.randn(2, 6, V, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    with tokenrl.profile() as p:
        tokenrl.token_logprobs(logits, head[2], row_mask=mask).logp.sum().backward()
    found = by_what(p)
    assert found["token_logprobs forward"].read == 4 * 6 * V and found["token_logprobs forward"].written == 0
    backward = found["token_logprobs backward"]
    assert (backward.read, backward.written) == (4 * 6 * V, 4 * 12 * V)
    assert backward.limit == "copy" and backward.least == 4 * 18 * V / 2e9
    assert backward.share == backward.least / backward.host


def test_calls_of_one_name_are_told_apart_by_what_is_around_them(head):
    """token_logprobs of the same shape on its own and inside, of more and of fewer rows, and again."""
    hidden, weight, ids = (x.detach() for x in head)
    few = ids.clone()
    few[0] = -100
    logits = torch.randn(2, 6, V)
    with tokenrl.profile() as p:
        tokenrl.token_logprobs(logits, few)
        tokenrl.linear_token_logprobs(hidden, weight, ids)
        tokenrl.token_logprobs(logits, few)
    found = by_what(p)
    assert found["token_logprobs forward"].read == 2 * 4 * 6 * V
    assert found["linear_token_logprobs forward", "token_logprobs forward"].read == 4 * N * V


def test_two_heads(head):
    hidden, weight, _ = head
    logits, other, rows = torch.randn(2, 6, V, requires_grad=True), torch.randn(2, 6, V), torch.ones(2, 6) > 0
    rows[0] = False
    with tokenrl.profile() as p:
        tokenrl.token_divergence(logits, other, row_mask=rows).sum().backward()
        others = (hidden.detach(), weight.detach())
        tokenrl.linear_token_divergence(hidden, weight, *others, row_mask=rows).sum().backward()
    assert logits.grad.any() and logits.grad[0].abs().max() == 0
    found = by_what(p)
    forward, backward = (found[f"divergence {way}"] for way in ("forward", "backward"))
    assert (forward.read, forward.written, forward.exponentials) == (2 * 4 * 6 * V, 0, 2 * 6 * V)
    assert (backward.read, backward.written) == (2 * 4 * 6 * V, 4 * N * V)
    linear = found["linear_divergence forward"]
    assert linear.read == 2 * 4 * (V * D + 6 * D) and linear.flops == 2 * 2 * 6 * D * V
    again = found["linear_divergence backward", "linear_divergence forward"]
    assert again.flops == 4 * 2 * 6 * D * V and again.calls == 1


def test_parts_add_up(head):
    with tokenrl.profile() as p:
        for _ in range(3):
            tokenrl.linear_token_logprobs(*head).logp.sum().backward()
    for way in ("forward", "backward"):
        outer = next(line for line in p.lines if line.what == f"linear_token_logprobs {way}")
        at = p.lines.index(outer) + 1
        inside = [line for line in p.lines[at:] if line.level == 1]
        inside = inside[: next(i for i, line in enumerate(inside) if line.what == lines.REST) + 1]
        assert outer.calls == 3
        for part in ("host", "launches"):
            assert sum(getattr(line, part) for line in inside) == pytest.approx(getattr(outer, part))
    step = p.step
    assert step.wall == pytest.approx(sum(line.host for line in p.lines if line.level == 0))
    assert step.total.launches == sum(line.launches for line in p.lines if line.level == 0)


def test_memory_and_reads_of_a_number(head):
    with tokenrl.profile() as p:
        kept = torch.zeros(1 << 20)
        torch.zeros(1 << 19)
        kept.sum().item()
    assert p.step.total.peak == 4 * (1 << 20) + 4 * (1 << 19) and p.step.total.syncs == 1
    assert p.lines[-1].what == lines.ELSE and p.lines[-1].syncs == 1
    with tokenrl.profile() as p:
        logp = tokenrl.token_logprobs(torch.zeros(6, 1000), head[2][0]).logp
    forward = by_what(p)["token_logprobs forward"]
    assert forward.peak == 4 * logp.numel() * logp.element_size() and forward.syncs == 0


def test_tiles_of_the_linear_ops_are_in_the_peak(head):
    hidden, weight, ids = (x.detach() for x in head)
    with tokenrl.profile() as p:
        tokenrl.linear_token_logprobs(hidden, weight, ids)
    assert by_what(p)["linear_token_logprobs forward"].peak >= 4 * N * V


def test_it_changes_no_gradient(head):
    def gradients():
        stats = tokenrl.linear_token_logprobs(*head)
        loss, _ = tokenrl.policy_loss("ctpo", stats.logp, torch.full((2, 6), -3.0), torch.tensor([1.0, -1.0]))
        return torch.autograd.grad(loss, head[:2])

    plain = gradients()
    with tokenrl.profile():
        profiled = gradients()
    for one, other in zip(plain, profiled, strict=True):
        assert one.any() and torch.equal(one, other)


def test_torch_func_and_a_graph(head):
    def loss(logits):
        return tokenrl.token_logprobs(logits, head[2]).logp.sum()

    logits = torch.randn(2, 6, V)
    compiled, leaf = torch.compile(loss, fullgraph=True, backend="aot_eager"), logits.clone().requires_grad_()
    compiled(leaf).backward()
    with tokenrl.profile() as p:
        found = torch.func.grad(loss)(logits)
        compiled(leaf).backward()
    assert torch.equal(2 * found, leaf.grad) and found.any()
    by_backend = {(line.what, line.backend): line for line in p.lines}
    for way in ("forward", "backward"):
        assert by_backend[f"token_logprobs {way}", "cpu"].calls == 1
        assert by_backend[f"token_logprobs {way}", "in a graph"].calls == 1


def test_nothing_of_ours_is_one_line():
    with tokenrl.profile() as p:
        torch.ones(3).sum()
    assert [line.what for line in p.lines] == [lines.ELSE] and p.lines[0].launches == 2


def test_it_ends_where_the_step_raises():
    with pytest.raises(ZeroDivisionError), tokenrl.profile() as p:
        1 / 0  # noqa: B018
    assert not ranges.watchers and not ranges.wanted()
    with pytest.raises(RuntimeError, match="^profile: read inside its with, accepted: after it has ended"):
        p.table()


def test_every_op_has_a_model_of_its_work():
    modules = (kernel_ops, divergence_ops, linear_ops, linear_divergence_ops)
    ops = {tuple(op.partition("_backward")[:2]) for module in modules for op in module.SCHEMAS}
    assert {(op, "backward" if way else "forward") for op, way in ops} <= FORMULAS.keys()


def test_table_json_and_trace(head, tmp_path):
    with tokenrl.profile() as p:
        loss, _ = tokenrl.linear_policy_loss("grpo", *head, torch.zeros(2, 6) - 3, torch.tensor([1.0, -1.0]))
        loss.backward()
    seen = p.table()
    assert max(map(len, seen.splitlines())) <= tables.WIDTH
    for line in p.lines:
        assert any(row.split()[: len(line.what.split())] == line.what.split() for row in seen.splitlines())
    found = json.loads(json.dumps(p.as_dict()))
    assert found["machine"]["threads"] == torch.get_num_threads() and found["machine"]["instruction_set"]
    assert [op["what"] for op in found["ops"]] == [line.what for line in p.lines]
    forward = next(op for op in found["ops"] if op["what"] == "linear_policy_loss forward")
    assert forward["flops_per_second"] == pytest.approx(forward["flops"] / forward["host"])
    p.trace(tmp_path / "trace.json")
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"tokenrl::linear_policy_loss forward [12, 8, 31] fp32 cpu", accounts.STEP} <= names


def test_long_names_stay_readable():
    line = lines.Line(
        "position_adaptive_clip backward", 1, 12345, 678901, 12.345678, 0.0, (65536, 16384, 262144), "fp32",
        "reference", 10**13, 10**12, 5, 10**15, "GEMM", 3.0, 139 * 10**9, 1000,
    )  # fmt: skip
    rows = [row for row in tables.text([tables.of_lines([line])]).splitlines() if row.strip()]
    assert max(map(len, rows)) <= tables.WIDTH
    assert "  position_adaptive_clip backward" in rows[3] and "  65536x16384x262144 fp32 reference" in rows[4]
    assert len(rows) == 5 and "139,000" in rows[3] and "678901" in rows[4] and "…" not in "".join(rows)


@pytest.mark.parametrize("head", ["one-pass", "hidden"])
def test_a_grpo_step_of_trl_names_our_ops(head):
    """The real trainer: generation, the model's forward and backward, the optimizer."""
    pytest.importorskip("trl", reason="trl is not installed (make test installs it)")
    from bench.trl_world import configured
    from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig

    trainer = configured(GRPOTrainer, steps=1, tokenrl=TokenRLConfig(head=head))
    with tokenrl.profile() as p:
        trainer.train()
    named = {(line.what, line.level) for line in p.lines if line.shape}
    ops = ("linear_policy_loss",) if head == "one-pass" else ("linear_token_logprobs", "objective")
    assert {(f"{op} {way}", 0) for op in ops for way in ("forward", "backward")} <= named
    assert {("token_logprobs forward", 1), ("token_logprobs backward", 1)} <= named
    assert p.lines[-1].launches > 1000 and p.step.total.syncs > 0
