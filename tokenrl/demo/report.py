"""What the demo found: the tables, the recorded rollouts, and whether the reward rose."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import LlamaForCausalLM

from ..instruments.rollout_batch import owned, save
from .loss_head import Parity, rollout_batch
from .train import History, Recording, Settings

OBJECTIVES = ("grpo", "ctpo")
CLEARLY = 0.1
TASK = "running totals modulo five"


@dataclass
class Trained:
    """One objective's run: its policy, history and a recorded step; mean held-out rewards before and after."""

    model: LlamaForCausalLM
    history: History
    recording: Recording
    before: dict[str, float]
    after: dict[str, float]


@dataclass
class Result:
    """All that the report shows. timings: median seconds of (tokenrl, eager) per objective and vocabulary. wall, cpu:
    seconds of the whole demo."""

    settings: Settings
    backend: str
    device: str
    warm_up_steps: int = 0
    trained: dict[str, Trained] = field(default_factory=dict)
    timings: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    parity: list[Parity] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    @property
    def recording(self) -> Recording:
        """The step that is saved, timed and checked."""
        return self.trained[OBJECTIVES[-1]].recording

    def not_risen(self) -> list[str]:
        """The objectives whose sampled reward on held-out problems did not rise clearly."""
        return [name for name, run in self.trained.items() if run.after["sampled"] < run.before["sampled"] + CLEARLY]


def _table(*columns: str, first: int = 1) -> Table:
    """The first columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < first else "right")
    return table


def learning(result: Result) -> Group:
    table = _table(
        "\nobjective", "sampled\nbefore", "\nafter", "greedy\nbefore", "\nafter", "clipped\nlow", "\nhigh", "\ndual"
    )
    for name, run in result.trained.items():
        rewards = [f"{when[how]:.3f}" for how in ("sampled", "greedy") for when in (run.before, run.after)]
        clips = torch.tensor(run.history.clips).mean(0).tolist()
        table.add_row(name, *rewards, *(f"{clip:.1%}" for clip in clips))
    title = f"Reward on {result.settings.held_out} held-out problems; clipped tokens while training"
    return Group(Text(title, "bold"), table)


def costs(result: Result) -> Group:
    rows, width, own = result.recording.logits.shape
    table = _table("objective", "vocabulary", "tokenrl", "eager", "ratio")
    for (name, vocabulary), (ours, eager) in result.timings.items():
        table.add_row(name, str(vocabulary), f"{ours * 1e3:.2f} ms", f"{eager * 1e3:.2f} ms", f"{eager / ours:.1f}x")
    what = f"Loss head, forward and backward: tokenrl ({result.backend}) and eager PyTorch on {result.device}"
    where = (
        f"medians on the recorded batch, [{rows}, {width}] tokens and {own} logits each; then on part of it, widened"
    )
    return Group(Text(what, "bold"), Text(where), table)


def exactness(result: Result) -> Group:
    table = _table("backend", "on", *OBJECTIVES, "", first=2)
    table.columns[-1].justify = "left"
    for row in result.parity:
        errors = [f"{row.errors[name]:.1e}" if name in row.errors else "-" for name in OBJECTIVES]
        reason = "" if row.reason is None else f"cannot run: {row.reason}"
        table.add_row(row.backend, row.device or "-", *errors, escape(reason))
    return Group(Text("Gradients against the fp64 reference: relative L2 error of dloss/dlogits", "bold"), table)


def write(result: Result, path: Path, console: Console) -> Path:
    """Prints the report, and writes it to path."""
    s = result.settings
    task = (
        f"Task: {TASK}. Warm-up: {result.warm_up_steps} supervised steps; then {s.steps} steps of "
        f"{s.prompts} x {s.rollouts} rollouts, {s.minibatches * s.epochs} updates each "
        f"({s.minibatches} mini-batches x {s.epochs} epochs), seed {s.seed}."
    )
    time = f"{result.wall:.0f} s wall, {result.cpu:.0f} s CPU, {torch.get_num_threads()} torch threads"
    paths = "\n".join(f"wrote {written}" for written in (*result.paths, path))
    body = Group(Text(task), "", learning(result), costs(result), exactness(result), Text(time), Text(paths))
    console.print(body)
    with path.open("w") as file:
        Console(file=file, width=140).print(body)
    return path


def save_rollouts(result: Result, path: Path) -> Path:
    """As tokenrl.record would, with the rewards and logp, of the policy after the step; ids are -100 where the mask is
    false."""
    source = {"task": TASK, "seed": str(result.settings.seed), "step": str(result.recording.step)}
    batch = replace(rollout_batch(result.recording, OBJECTIVES[-1]), source=source)
    save(batch.mapped(lambda _, x: owned(x)), path)
    return path
