"""python -m bench: correctness first, then one line per case and backend, beside its competitors."""

import os
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from typer import Option

from tokenrl.errors import unknown
from tokenrl.instruments.progress import tracked
from tokenrl.ops import backends

from . import cliffs, distill_step, fused, overhead, plan_table, report, terminal, trl_step
from .case import Spec
from .cases import DTYPES, LINEAR_OPS, OPS, chosen_specs, default_specs, make
from .linear_cases import SEQUENCES
from .machine import keep_freed_memory, machine_line
from .run import Findings, default_backends, run_case

OWN_TABLES = {
    "overhead": overhead.measure,
    "cliffs": cliffs.measure,
    "fused": fused.measure,
    "trl": trl_step.measure,
    "distill": distill_step.measure,
    "plan": plan_table.measure,
}  # no cases beside competitors
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHAPE = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")
SIZES = "ROWSxCOLUMNS, such as 2048x151936; TOKENSxWIDTHxCOLUMNS of the linear ops, such as 2048x1024x151936"


def bad(option: str, given: object, accepted: str) -> typer.BadParameter:
    return typer.BadParameter(f"got {given!r}, accepted: {accepted}.", param_hint=option)


def each_of(option: str, given: list[str], accepted: list[str]) -> list[str]:
    for one in given:
        if one not in accepted:
            raise typer.BadParameter(str(unknown(option, one, accepted)))
    return list(dict.fromkeys(given))


def parsed_shapes(given: list[str]) -> list[tuple[int, ...]]:
    for text in given:
        if SHAPE.fullmatch(text) is None:
            raise bad("--shape", text, f"positive integers, {SIZES}")
    return [tuple(map(int, text.split("x"))) for text in given]


def parsed_device(given: str | None) -> str:
    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise bad("--device", device, "cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise bad("--device", device, "cpu (torch sees no GPU here)")
    return device


def parsed_backends(given: list[str], device: str) -> list[str]:
    """Those named, if they can run here; without names all that can."""
    for name in each_of("--backend", given, list(backends.BACKENDS)):
        if reason := backends.BACKENDS[name].why_not(torch.device(device)):
            able = [n for n, b in backends.BACKENDS.items() if b.why_not(torch.device(device)) is None]
            raise bad("--backend", name, f"{', '.join(able)}; on {device} {name} cannot run: {reason}")
    return list(dict.fromkeys(given)) or default_backends(torch.device(device))


def parsed_specs(device: str, small: bool, ops: list[str], shapes: list[str], dtypes: list[str]) -> list[Spec]:
    """The cases to run; an error where the options leave none, or none of a shape."""
    named, sizes = each_of("--op", ops, [*OPS, *OWN_TABLES]), parsed_shapes(shapes)
    ops = [op for op in named if op not in OWN_TABLES]
    if named and not ops:
        return []
    names = each_of("--dtype", [ALIASES.get(d, d) for d in dtypes], [*DTYPES, *ALIASES])
    specs = chosen_specs(device, small, ops, sizes, names)
    if not specs:
        there = dict.fromkeys(f"{spec.op} {spec.dtype}" for spec in default_specs(device, small))
        every = f"token_logprobs, token_divergence, {' and '.join(LINEAR_OPS)} in any dtype, policy_loss in float32"
        accepted = f"{', '.join(there)}; with --shape {every}, the linear ops of three numbers"
        raise bad("--op, --dtype, --shape", " ".join(ops + names + shapes), accepted)
    for text, size in zip(shapes, sizes, strict=True):
        if all(spec.shape != size for spec in specs):
            raise bad("--shape", text, f"with {', '.join(ops)}: {SIZES}")
    for spec in specs:
        if spec.op == "linear_policy_loss" and spec.shape[0] % SEQUENCES:
            given = "x".join(map(str, spec.shape))
            raise bad("--shape", given, f"with linear_policy_loss: a multiple of {SEQUENCES} tokens")
    return specs


def write(result: dict, out: Path | None, json: Path | None, png: Path | None) -> None:
    if out:
        report.write_folder(result, out)
    if json:
        report.write_json(result, json)
    if png:
        from .figure import draw

        draw(result, png)


def finish(findings: Findings) -> None:
    """Ends with 1 where a backend was wrong."""
    if findings.failures:
        print("\n".join(["wrong results, of which no speed is printed:", *findings.failures]))
        raise typer.Exit(1)
    if findings.passed:
        print(f"{len(findings.passed)} checks: every value and gradient is within the tolerance rule of tokenrl.parity")


def main(
    op: Annotated[list[str], Option(help=f"{', '.join([*OPS, *OWN_TABLES])}; repeatable.")] = [],  # noqa: B006
    shape: Annotated[list[str], Option(help=f"{SIZES}; repeatable.")] = [],  # noqa: B006
    dtype: Annotated[list[str], Option(help=f"Of logits or head: {', '.join(DTYPES)}; repeatable.")] = [],  # noqa: B006
    backend: Annotated[list[str], Option(help=f"{', '.join(backends.BACKENDS)}; repeatable.")] = [],  # noqa: B006
    device: Annotated[str | None, Option(help="cpu or cuda; cuda where there is one.")] = None,
    threads: Annotated[int | None, Option(min=1, help="Of torch on the CPU.")] = None,
    repeats: Annotated[int, Option(min=1, help="Samples of each call; at least 3, fewer than this of a slow one.")] = 7,
    no_compile: Annotated[bool, Option("--no-compile", help="Leave torch.compile out.")] = False,
    check_only: Annotated[bool, Option("--check-only", help="Small sizes, correctness only.")] = False,
    json: Annotated[Path | None, Option(help="File for the results as JSON.")] = None,
    png: Annotated[Path | None, Option(help="File for the figure.")] = None,
    lines: Annotated[
        Path | None, Option(help="File that the JSON line of each case is added to, when it is done.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder for {device}.md, {device}.json and {device}.png.")] = None,
) -> None:
    """Checks each backend against the fp64 reference, then times it beside eager PyTorch, torch.compile, TRL, Liger.

    Example: tokenrl bench --op token_logprobs --shape 2048x32000 --dtype bf16
    """
    place = parsed_device(device)
    load, allocator = os.getloadavg()[0], keep_freed_memory()
    specs, names = parsed_specs(place, check_only, op, shape, dtype), parsed_backends(backend, place)
    if threads:
        torch.set_num_threads(threads)
    findings = Findings()
    print(f"backends on {place}: {', '.join(names) or 'none'}", flush=True)
    for spec in tracked(specs, lambda spec: f"{spec.op} {'x'.join(map(str, spec.shape))}"):
        case, before = make(spec, place), len(findings.lines)
        run_case(case, names, place, findings, repeats=repeats, compile=not no_compile, check_only=check_only)
        del case
        if lines:
            report.add_lines(findings.lines[before:], lines)
    if not check_only:
        result = {
            "device": place, "machine": machine_line(place, load, allocator), "lines": findings.lines,
            "missing": findings.missing, "failures": findings.failures,
        }  # fmt: skip
        result |= {name: OWN_TABLES[name]() for name in tracked(name for name in OWN_TABLES if name in op)}
        terminal.show(result, Console())
        write(result, out, json, png)
    finish(findings)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m bench")
