"""verl's real functions without an import of verl, which needs ray and more: the text of the installed files, run here.

Nothing is replaced but what the functions never call: the types of other settings in ActorConfig are its base class.
"""

import ast
import dataclasses
import importlib.util
import inspect
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Optional  # noqa: UP035  their annotations' names

import numpy as np
import torch

CORE = "verl.trainer.ppo.core_algos"


@cache
def folder() -> Path | None:
    """verl's, None where it is not installed."""
    found = importlib.util.find_spec("verl")
    return None if found is None or found.origin is None else Path(found.origin).parent


def lifted(name: str, file: str, wanted: Callable[[ast.stmt], bool], **known: Any) -> ModuleType:
    """A module of the statements of a file of verl that are wanted."""
    path = folder() / file
    module = ModuleType(name)
    module.__dict__.update(known, torch=torch, np=np, Any=Any, Callable=Callable, Optional=Optional)
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if wanted(node)]
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def named(*names: str) -> Callable[[ast.stmt], bool]:
    return lambda node: getattr(node, "name", None) in names


@cache
def configs() -> ModuleType:
    """With verl's ActorConfig and PolicyLossConfig."""
    base = lifted("verl.base_config", "base_config.py", lambda node: True).BaseConfig
    file, names = "workers/config/actor.py", ("PolicyLossConfig", "ActorConfig")
    known = {"MISSING": "???", "dataclass": dataclasses.dataclass, "field": dataclasses.field, "BaseConfig": base}
    classes = [node for node in ast.parse((folder() / file).read_text()).body if named(*names)(node)]
    others = {n.id for c in classes for n in ast.walk(c) if isinstance(n, ast.Name) and n.id.endswith("Config")}
    known |= {name: base for name in others - set(names) - set(known)}
    return lifted("verl.workers.config", file, named(*names), **known)


def actor_config(loss_agg_mode: str = "token-mean", info: dict | None = None, **options: Any) -> Any:
    """A real ActorConfig. options: its fields, and those of its policy_loss."""
    made = configs()
    of_loss = {f.name for f in dataclasses.fields(made.PolicyLossConfig)}
    policy_loss = made.PolicyLossConfig(**{key: options.pop(key) for key in list(options) if key in of_loss})
    known = {f.name for f in dataclasses.fields(made.ActorConfig)}
    more = {"rollout_n": 4, "global_batch_info": info or {}}
    return made.ActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=1, loss_agg_mode=loss_agg_mode, policy_loss=policy_loss,
        **{key: value for key, value in more.items() if key in known}, **options,
    )  # fmt: skip


def core_algos() -> ModuleType:
    """A fresh verl.trainer.ppo.core_algos: its registry, its aggregation and its policy losses."""
    means = lifted("verl_F", "utils/torch_functional.py", named("masked_sum", "masked_mean"))

    def wanted(node: ast.stmt) -> bool:
        name = getattr(node, "name", "")
        kept = ("register_policy_loss", "get_policy_loss_fn", "agg_loss")
        assigned = isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "POLICY_LOSS_REGISTRY"
        return assigned or name in kept or name.startswith("compute_policy_loss_")

    class Other:
        """A type that annotations and isinstance name."""

    known = {"verl_F": means, "ActorConfig": configs().ActorConfig, "AlgoConfig": Other, "DictConfig": Other}
    return lifted(CORE, "trainer/ppo/core_algos.py", wanted, PolicyLossFn=Callable, **known)


def text(module: ModuleType) -> str:
    return (folder() / "/".join(module.__name__.split(".")[1:])).with_suffix(".py").read_text()


def version() -> str:
    return (folder() / "version/version").read_text().strip()


def counts_globally(core: ModuleType) -> bool:
    """From 0.7.0 on."""
    return "dp_size" in inspect.signature(core.agg_loss).parameters


def loads_plugins() -> bool:
    """From 0.9.0 on."""
    return "verl.plugins" in (folder() / "__init__.py").read_text()


def has_caller() -> bool:
    """From 0.7.1 on, in this form."""
    return "class Metric" in (folder() / "utils/metric/utils.py").read_text()


def caller(**known: Any) -> Callable[..., Any]:
    """verl's ppo_loss, of padded batches: what takes a nested tensor apart does nothing."""
    metric = lifted("verl.utils.metric", "utils/metric/utils.py", lambda node: True)
    types = {"TensorDict": dict, "ActorConfig": configs().ActorConfig, "no_padding_2_padding": lambda x, data: x}
    types |= {"Metric": metric.Metric, "AggregationType": metric.AggregationType}
    return lifted("losses", "workers/utils/losses.py", named("ppo_loss"), **types, **known).ppo_loss
