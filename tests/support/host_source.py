"""Real functions of trainers without an import of them, which needs ray, deepspeed and more: the text of their wheels'
files (build/hosts, where `make test` unpacks them; nothing is installed), run here."""

import ast
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT

HOSTS = ROOT / "build/hosts"
ANNOTATIONS = "from __future__ import annotations\n"


def needed(package: str) -> Path:
    """The folder of a package of a wheel; without it a module of tests is skipped."""
    folder = HOSTS / package
    if not folder.is_dir():
        pytest.skip(f"{package} is not in build/hosts (make build/hosts/.done)", allow_module_level=True)
    return folder


def version(distribution: str) -> str:
    (found,) = HOSTS.glob(f"{distribution}-*.dist-info")
    return found.name.removesuffix(".dist-info").split("-")[1]


def lifted(path: Path, *names: str, **known: Any) -> ModuleType:
    """A module of a file's functions, classes and constants of these names, in the file's order; their annotations are
    not evaluated. known: what they call beside."""
    return executed(path, _of_names(path, names), known)


def methods(path: Path, name: str, *wanted: str, **known: Any) -> type:
    """A class of some methods of a file's class, without its bases and their decorators."""
    return vars(executed(path, _of_methods(path, name, wanted), known))[name]


def executed(path: Path, code: CodeType, known: dict[str, Any]) -> ModuleType:
    module = ModuleType(f"lifted_{path.stem}")
    module.__dict__.update(torch=torch, **known)
    sys.modules[module.__name__] = module  # where dataclasses look their annotations up
    try:
        exec(code, module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


@cache
def _of_names(path: Path, names: tuple[str, ...]) -> CodeType:
    tree = ast.parse(ANNOTATIONS + path.read_text())
    wanted = {name: node for node in tree.body for name in names_of(node) if name in names}
    assert set(wanted) == set(names), set(names) - set(wanted)
    tree.body = [tree.body[0], *(node for node in tree.body if any(node is w for w in wanted.values()))]
    return compile(tree, str(path), "exec")


@cache
def _of_methods(path: Path, name: str, wanted: tuple[str, ...]) -> CodeType:
    tree = ast.parse(ANNOTATIONS + path.read_text())
    (found,) = [node for node in tree.body if getattr(node, "name", None) == name]
    found.bases, found.keywords, found.decorator_list = [], [], []
    found.body = [node for node in found.body if getattr(node, "name", None) in wanted]
    assert {node.name for node in found.body} == set(wanted)
    for node in found.body:
        node.decorator_list = []
    tree.body = [tree.body[0], found]
    return compile(tree, str(path), "exec")


def names_of(node: ast.stmt) -> list[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [getattr(node, "name", "")] + [target.id for target in targets if isinstance(target, ast.Name)]


def batch(seed: int, spread: float = 1.2, per_token: bool = False, rows: int = 6, width: int = 9):
    """logp, old_logp, rollout_logp, advantages [B, T] (one per row unless per_token), mask: with holes and a row of
    A = 0, float64; all are log-probs."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    old = -2 - normal(rows, width).abs()
    logp, rollout = ((old + s * normal(rows, width)).clamp(max=-1e-3) for s in (spread, 0.4))
    mask = torch.rand(rows, width, generator=g) < 0.75
    mask[:, 2] = True
    advantages = normal(rows, width) if per_token else normal(rows, 1).expand(rows, width).clone()
    advantages[2] = 0
    return logp, old, rollout, advantages, mask


def compared(truth, found) -> tuple[float, float]:
    """Relative differences of two (loss, gradient): of the loss to the size of its terms, of the gradient to its
    largest."""
    (loss, grad), (our_loss, our_grad) = truth, found
    size = max(abs(loss).item(), grad.abs().sum().item())
    assert size > 0 and grad.isfinite().all()
    return abs(our_loss - loss).item() / size, ((our_grad - grad).abs().max() / grad.abs().max()).item()


def with_gradient(loss: Callable[[torch.Tensor], Any], logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(loss, its gradient, the rest) of what a function of logp returns."""
    logp = logp.clone().requires_grad_()
    value, *rest = loss(logp)
    value.backward()
    return value.detach(), logp.grad, rest
