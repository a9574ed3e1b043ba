"""The demo: its task, its loop, and all that it writes. That the reward rises is checked by the command itself."""

import random

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tokenrl
from tokenrl import demo
from tokenrl.commands import demo as demo_command
from tokenrl.demo import loss_head, task, train
from tokenrl.ops import backends

TINY = demo.Settings(
    steps=3, prompts=3, rollouts=4, minibatches=2, warm_up_steps=10, warm_up_batch=32, held_out=32, learning_rate=1e-3,
)  # fmt: skip


pytestmark = pytest.mark.long  # before all others: one worker has them all, and they share one run


@pytest.fixture(scope="module", autouse=True)
def reward_from_the_start():
    """A policy that was hardly warmed up earns nothing in the task; here it earns the share of threes it writes."""
    with pytest.MonkeyPatch.context() as patch:
        three = task.CHARACTERS.index("3")
        patch.setattr(train, "graded", lambda terms, responses: (responses == three).float().mean(1))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return demo.run(tmp_path_factory.mktemp("demo"), TINY, Console(quiet=True))


def test_worked_solutions_and_prompts():
    assert task.solution((3, 1, 4, 2)) == "3430."
    assert task.solution((0, 0, 0, 0)) == "0000."
    assert task.prompt((3, 1, 4, 2)) == "3142=".ljust(task.PROMPT_LENGTH)
    assert task.decode(task.encode(["3430."], 7)) == ["3430.  "]


@pytest.mark.parametrize(
    "response,expected",
    [
        ("3430.", 1),
        ("3430.   ", 1),
        ("3430.12", 1),
        ("3431.", 0),
        ("3330.", 0),
        ("430.", 0),
        ("34300.", 0),
        ("3430", 0),
        (".", 0),
        ("", 0),
    ],  # fmt: skip
)
def test_the_reward_on_hand_cases(response, expected):
    assert task.reward((3, 1, 4, 2), response) == expected


def test_training_and_held_out_problems_are_apart():
    training, evaluation = (set(task.problems(300, random.Random(0), evaluation)) for evaluation in (False, True))
    assert not training & evaluation
    assert {len(terms) for terms in training} == set(range(task.MIN_TERMS, task.MAX_TERMS + 1))
    for terms in training:
        assert len(task.prompt(terms)) == task.PROMPT_LENGTH and len(task.solution(terms)) <= task.RESPONSE_LENGTH
        assert task.reward(terms, task.solution(terms)) == 1


def test_the_sampler_agrees_with_the_teacher_forced_model():
    model = demo.build(0, torch.device("cpu"))
    prompts = task.encode([task.prompt(t) for t in task.problems(5, random.Random(0))], task.PROMPT_LENGTH)
    responses, mask = demo.model.sample(model, prompts, 1.0, None)
    with torch.no_grad():
        likeliest = demo.model.response_logits(model, torch.cat([prompts, responses], 1)).argmax(-1)
    assert torch.equal(likeliest[mask], responses[mask])
    ended = (responses == task.END).any(1)
    assert torch.equal(mask.sum(1)[ended] - 1, (responses == task.END).int().argmax(1)[ended])
    assert (responses[~mask] == task.BLANK).all()


def test_advantages_are_normalised_in_each_group(run):
    batch = run.recording.batch
    groups = batch.advantages.view(-1, TINY.rollouts)
    assert groups.mean(1).abs().max() < 1e-5
    rewards = batch.rewards.view(-1, TINY.rollouts)
    assert torch.equal(groups.std(1) > 0.5, rewards.std(1) > 0)


def test_it_writes_every_file(run):
    assert [path.name for path in run.paths] == ["rollouts.safetensors", "curves.png", "report.txt"]
    assert all(path.stat().st_size > 500 for path in run.paths)
    text = run.paths[2].read_text()
    for name in (*backends.BACKENDS, "grpo", "ctpo", "eager PyTorch", *(str(path) for path in run.paths)):
        assert name in text.replace("\n", "")


def test_the_clip_counts_by_position_add_up_to_the_metrics(run):
    for trained in run.trained.values():
        history = trained.history
        for clips, s, clipped in zip(history.clips, history.statistics, history.clipped, strict=True):
            assert (clipped.sum() / (~s.isnan()).sum()).item() == pytest.approx(sum(clips), abs=1e-6)


def test_the_recorded_rollouts_come_back(run):
    path = run.paths[0]
    tensors = load_file(path)
    rows, width = TINY.prompts * TINY.rollouts, task.RESPONSE_LENGTH
    assert tensors["logits"].shape == (rows, width, len(task.CHARACTERS))
    assert tensors["mask"].dtype == torch.bool
    assert tensors["group_ids"].tolist() == [i // TINY.rollouts for i in range(rows)]
    assert torch.equal(tensors["ids"] == -100, ~tensors["mask"])
    logp = tokenrl.token_logprobs(tensors["logits"], tensors["ids"], backend="reference").logp
    assert torch.allclose(logp, tensors["logp"], atol=1e-5)
    _, metrics = tokenrl.policy_loss("grpo", logp, tensors["old_logp"], tensors["advantages"], mask=tensors["mask"])
    assert metrics.ratio_max > 1.001
    batch = tokenrl.load_batch(path)
    assert batch.source == {"task": "running totals modulo five", "seed": "0", "step": "1"}
    assert batch.settings == {"temperature": 1.0} and batch.objective.name == "ctpo"
    assert batch.loss("grpo")[1].ratio_max == pytest.approx(metrics.ratio_max)


def test_gradients_are_those_of_the_fp64_reference_on_every_backend(run):
    assert {row.backend for row in run.parity} == set(backends.BACKENDS)
    for row in run.parity:
        assert row.reason or set(row.errors) == {"grpo", "ctpo"} and max(row.errors.values()) < 1e-4, row
    assert any(row.backend == "reference" and row.reason is None for row in run.parity)


@pytest.mark.parametrize("name", ["grpo", "ctpo"])
def test_the_eager_spelling_is_the_same_loss(run, name):
    heads = loss_head.loss_head, loss_head.eager_loss_head
    ours, eager = (loss_head.gradient(head, name, run.recording, torch.float32) for head in heads)
    assert ours.abs().max() > 0 and loss_head.relative_error(eager, ours.double()) < 1e-4


@pytest.fixture
def one_thread():
    """As demo.run trains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_run(run, one_thread):
    """To the rounding of the model's GEMMs, whose bits torch does not promise."""
    model = demo.build(TINY.seed, torch.device("cpu"))
    demo.warm_up(model, TINY, lambda *progress: None)
    _, history, recording = train.reinforce(model, "ctpo", TINY, lambda *progress: None)
    assert history.rewards == pytest.approx(run.trained["ctpo"].history.rewards)
    assert torch.equal(recording.batch.ids, run.recording.batch.ids)
    torch.testing.assert_close(recording.logits, run.recording.logits, rtol=1e-4, atol=1e-5)


def test_the_command_fails_when_the_reward_does_not_rise(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run", lambda *arguments: run)
    for before, after, fell in ((0.2, 0.5, []), (0.2, 0.25, ["ctpo"])):
        monkeypatch.setattr(run.trained["grpo"], "before", {"sampled": 0.2})
        monkeypatch.setattr(run.trained["grpo"], "after", {"sampled": 0.5})
        monkeypatch.setattr(run.trained["ctpo"], "before", {"sampled": before})
        monkeypatch.setattr(run.trained["ctpo"], "after", {"sampled": after})
        assert run.not_risen() == fell
    with pytest.raises(SystemExit, match="did not rise .*: ctpo 0.200 -> 0.250"):
        demo_command.demo(tmp_path)
