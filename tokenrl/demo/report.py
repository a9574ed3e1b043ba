"""What the demo found: the tables, the recorded rollouts, and whether the reward rose."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import tokenrl

from .parity import Parity, Recording, Timing
from .train import History, Rollouts, Settings

OBJECTIVES = ("grpo", "ctpo")
CLEARLY = 0.1
TASK = "running totals modulo five"


@dataclass
class Trained:
    """One objective's run: its policy, history and last rollouts, and the mean reward on held-out problems before and after."""

    model: LlamaForCausalLM
    history: History
    batch: Rollouts
    before: dict[str, float]
    after: dict[str, float]


@dataclass
class Result:
    """Everything that the report shows. timings: (tokenrl, eager) per objective. wall, cpu: seconds of the whole demo."""

    settings: Settings
    backend: str
    device: str
    warm_up_steps: int = 0
    trained: dict[str, Trained] = field(default_factory=dict)
    recording: Recording | None = None
    timings: dict[str, tuple[Timing, Timing]] = field(default_factory=dict)
    parity: list[Parity] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0

    def not_risen(self) -> list[str]:
        """The objectives whose sampled reward on held-out problems did not rise clearly."""
        return [name for name, run in self.trained.items() if run.after["sampled"] < run.before["sampled"] + CLEARLY]


def _table(title: str, *columns: str, first: int = 1) -> Table:
    """The first columns are text, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < first else "right")
    return table


def learning(result: Result) -> Table:
    table = _table(
        f"Reward on {result.settings.held_out} held-out problems, and clipped tokens in training",
        "objective", "sampled before", "after", "greedy before", "after", "clip low", "clip high", "dual",
    )  # fmt: skip
    for name, run in result.trained.items():
        rewards = [f"{when[how]:.3f}" for how in ("sampled", "greedy") for when in (run.before, run.after)]
        clips = torch.tensor(run.history.clips).mean(0).tolist()
        table.add_row(name, *rewards, *(f"{clip:.1%}" for clip in clips))
    return table


def costs(result: Result) -> Table:
    rows, width, vocabulary = result.recording.logits.shape
    table = _table(
        f"Loss head on the recorded batch [{rows}, {width}, {vocabulary}], forward and backward, median, on {result.device}",
        "objective", f"tokenrl ({result.backend})", "eager PyTorch", "ratio", "CPU time", "eager", "ratio",
    )  # fmt: skip
    for name, (ours, eager) in result.timings.items():
        wall = f"{ours.wall * 1e3:.2f} ms", f"{eager.wall * 1e3:.2f} ms", f"{eager.wall / ours.wall:.1f}x"
        cpu = f"{ours.cpu * 1e3:.2f} ms", f"{eager.cpu * 1e3:.2f} ms", f"{eager.cpu / ours.cpu:.1f}x"
        table.add_row(name, *wall, *cpu)
    return table


def exactness(result: Result) -> Table:
    table = _table("Gradients against the fp64 reference: relative L2 error of dloss/dlogits", "backend", "on", *OBJECTIVES, "", first=2)
    table.columns[-1].justify = "left"
    for row in result.parity:
        errors = [f"{row.errors[name]:.1e}" if name in row.errors else "-" for name in OBJECTIVES]
        table.add_row(row.backend, row.device or "-", *errors, "" if row.reason is None else escape(f"cannot run: {row.reason}"))
    return table


def write(result: Result, path: Path, console: Console) -> Path:
    """Prints the report, and writes it to path."""
    s = result.settings
    updates = s.minibatches * s.epochs
    lines = (
        f"Task: {TASK}. Warm-up: {result.warm_up_steps} supervised steps; then {s.steps} steps of {s.prompts} x {s.rollouts} rollouts,\n"
        f"{updates} updates each ({s.minibatches} mini-batches x {s.epochs} epochs), seed {s.seed}.",
        f"{result.wall:.0f} s wall, {result.cpu:.0f} s CPU, torch threads: {torch.get_num_threads()}.",
        "\n".join(f"wrote {written}" for written in (*result.paths, path)),
    )
    tables = learning(result), costs(result), exactness(result)
    body = Group(lines[0], "", *tables, lines[1], escape(lines[2]))
    console.print(body, highlight=False)
    with path.open("w") as file:
        Console(file=file, width=140).print(body, highlight=False)
    return path


def save_rollouts(result: Result, path: Path) -> Path:
    """The recorded batch as safetensors: logits [B, T, V], ids, logp, old_logp, mask [B, T], advantages, rewards, group_ids [B].

    ids are -100 where the mask is false. logp is the policy's after the step's updates, old_logp that of the policy that sampled.
    """
    recording, batch = result.recording, result.recording.batch
    (logp,) = tokenrl.token_logprobs(recording.logits, batch.ids, temperature=recording.temperature, outputs=("logp",))
    tensors = {
        "logits": recording.logits, "ids": batch.ids, "logp": logp, "old_logp": batch.old_logp, "mask": batch.mask,
        "advantages": batch.advantages, "rewards": batch.rewards, "group_ids": batch.group_ids,
    }  # fmt: skip
    metadata = {
        "task": TASK, "temperature": str(recording.temperature), "objective": OBJECTIVES[-1], "seed": str(result.settings.seed),
    }  # fmt: skip
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
