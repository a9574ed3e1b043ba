"""`tokenrl demo`: trains a small policy with two objectives; what the loss head costs, how exact each backend is."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is built from a config; nothing is ever downloaded

from transformers import LlamaForCausalLM

from ..ops import backends
from . import loss_head, plots, report
from .model import build
from .report import OBJECTIVES, Result, Trained
from .train import Settings, evaluate, reinforce, warm_up

__all__ = ["Result", "Settings", "run"]


def run(out: Path, settings: Settings, console: Console) -> Result:
    """The whole demo; writes report.txt, curves.png and rollouts.safetensors into `out` and prints the report."""
    begin = time.perf_counter(), time.process_time()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = Result(settings, backends.choose(None, device).name, device.type)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is so small that a second thread waits more than it works
    result.warm_up_steps, result.trained = _train(settings, device, console)
    torch.set_num_threads(threads)
    for recording, repeats in ((result.recording, 100), (loss_head.widened(result.recording), 7)):
        vocabulary = recording.logits.shape[-1]
        for name in OBJECTIVES:
            result.timings[name, vocabulary] = loss_head.timings(name, recording, repeats)
    result.parity = loss_head.parity(result.recording, OBJECTIVES)
    rollouts, figure = out / "rollouts.safetensors", out / "curves.png"
    result.paths = [report.save_rollouts(result, rollouts), plots.curves(result, figure)]
    result.wall, result.cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    result.paths.append(report.write(result, out / "report.txt", console))
    return result


def _train(settings: Settings, device: torch.device, console: Console) -> tuple[int, dict[str, Trained]]:
    """The number of warm-up steps, and what each objective made of the same warm start."""
    reward = TextColumn("reward {task.fields[reward]:.2f}")
    columns = TextColumn("{task.description:<8}"), BarColumn(), MofNCompleteColumn(), reward
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {"warm-up": progress.add_task("warm-up", total=settings.warm_up_steps, reward=0.0)}
        for name in OBJECTIVES:
            bars[name] = progress.add_task(name, total=settings.steps, reward=0.0, start=False)
        model = build(settings.seed, device)
        steps = warm_up(model, settings, _shown(progress, bars["warm-up"]))
        before = _rewards(model, settings)
        progress.update(bars["warm-up"], total=steps, completed=steps, reward=before["sampled"])
        trained = {}
        for name in OBJECTIVES:
            progress.start_task(bars[name])
            tuned, history, recording = reinforce(model, name, settings, _shown(progress, bars[name]))
            trained[name] = Trained(tuned, history, recording, before, _rewards(tuned, settings))
    return steps, trained


def _rewards(model: LlamaForCausalLM, settings: Settings) -> dict[str, float]:
    return {"sampled": evaluate(model, settings), "greedy": evaluate(model, settings, greedy=True)}


def _shown(progress: Progress, bar: TaskID) -> Callable[[int, float], None]:
    """An on_step(step, reward) that moves a bar."""
    return lambda step, reward: progress.update(bar, completed=step, reward=reward)
