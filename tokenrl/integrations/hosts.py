"""The hosts, the versions that their hooks are held to, and the check of what is installed."""

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_name
from ..errors import wrong
from ..objectives.gates.kl import KlGate
from ..objectives.metrics import RAW, Metrics
from ..objectives.policy import OBJECTIVES, Objective, objective


@dataclass(frozen=True)
class Host:
    """A hook: its distribution, the oldest version it works with and the newest that the tests ran with."""

    distribution: str
    what: str
    oldest: str
    newest: str


HOSTS = {
    "transformers": Host("transformers", "the fused head", "4.50.3", "5.24.0"),
    "trl": Host("trl", "the loss", "1.10.0", "1.16.0"),
    "trl-head": Host("trl", "the fused head", "1.15.0", "1.16.0"),
    "verl": Host("verl", "the losses and the head", "0.6.1", "0.9.1"),
    "openrlhf": Host("openrlhf", "the loss", "0.11.2", "0.11.2"),
    "skyrl": Host("skyrl", "the losses", "0.3.0", "0.3.0"),
    "swift": Host("ms-swift", "the loss", "4.6.0", "4.6.0"),
    "prime_rl": Host("prime_rl", "the loss", "0.8.0", "0.8.0"),
    "slime": Host("slime", "the loss", "0.3.1", "0.3.1"),
    "miles": Host("miles", "the loss", "0.1.0", "0.1.0"),
    "areal": Host("areal", "the losses", "1.0.4", "1.0.4"),
    "torchtitan": Host("torchtitan", "the loss of its RL experiment", "0.2.2", "0.2.2"),
    "nemo_rl": Host("nemo_rl", "the loss", "0.6.0", "0.6.0"),
}

VARIABLE = "TOKENRL_OBJECTIVE"  # of hosts whose settings take nothing but theirs
FORM = """a name of tokenrl.OBJECTIVES, or a JSON object as {"ctpo": {"eps_low": 0.03}}"""
LEAST_WEIGHT = 1e-8  # of an importance weight inside a ratio
PPO = ("ppo", "grpo", "dr_grpo", "dapo", "bnpo")  # rows that take a host's bounds of PPO

NEEDS = {  # what hosts do not hand to a policy loss
    "ba": "group ids", "real": "group ids", "fiberpo_domain": "group ids", "sspo": "segment ids", "lpo": "segment ids",
    "hapo": "entropy scores", "rmt": "a next-token weight", "dppo_topk": "top-K divergences",
}  # fmt: skip


def needed_by(row: Objective) -> str | None:
    """What a row needs beside log-probs, advantages and mask; None: nothing."""
    if isinstance(row.gate, KlGate):
        return "a reference's log-probs"
    return NEEDS.get(row.name, "group ids" if row.aggregation in ("group-mean", "balanced") else None)


def check_fed(name: str, row: Objective) -> None:
    """ValueError for a row that needs what a host does not hand to a loss."""
    if needs := needed_by(row):
        raise wrong("objective", f"{row.name!r}, which needs {needs}", f"a row of what {name} hands to a policy loss")


def chosen(host: str = "the trainer") -> tuple[str, dict[str, Any]] | None:
    """(the row that the variable names, its parameters there); None where it is not set."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    name, parameters = text, {}
    if text.startswith("{"):
        try:
            ((name, parameters),) = json.loads(text).items()
        except ValueError:  # no JSON, or not one row
            raise wrong(VARIABLE, text, FORM) from None
        if not isinstance(parameters, dict) or "aggregation" in parameters:
            raise wrong(VARIABLE, text, f"{FORM}; the aggregation is {host}'s")
    check_name(VARIABLE, name, OBJECTIVES)
    objective(name, **parameters)
    return name, parameters


def chosen_objective(host: str, settings: Mapping[str, Mapping[str, Any]]) -> Objective | None:
    """The row that the variable names; None where it is not set: the host's own loss. settings: what rows take from the
    host's, below what the variable says."""
    found = chosen(host)
    if found is None:
        return None
    name, parameters = found
    row = objective(name, **{**settings.get(name, {}), **parameters})
    check_fed(host, row)
    return row


class Choice:
    """The row that a host's use() was given last; None: that of the variable."""

    def __init__(self, host: str):
        self.host = host
        self.name: str | Objective | None = None
        self.parameters: dict[str, Any] = {}

    def take(self, name: str | Objective | None, parameters: dict[str, Any]) -> None:
        if name is not None:
            check_fed(self.host, objective(name, **parameters))
        chosen_objective(self.host, {})
        self.name, self.parameters = name, parameters

    def row(self, settings: Mapping[str, Mapping[str, Any]]) -> Objective | None:
        """With the host's settings below what was given; None: the host's own loss."""
        if self.name is None:
            return chosen_objective(self.host, settings)
        known = settings.get(self.name, {}) if isinstance(self.name, str) else {}
        return objective(self.name, **{**known, **self.parameters})


def at_least_fp32(x: Tensor) -> Tensor:
    """Log-probs of 16 bits in 32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def weighed(row: Objective, old_logp: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(old_logp, token_weight) with a rollout's importance weights, which some rows take into their ratio."""
    if weight is None or not row.gate.reads_rollout:
        return old_logp, weight
    return old_logp - weight.clamp(min=LEAST_WEIGHT).log(), None


def clip_fraction(metrics: Metrics) -> Tensor:
    """0-d, on the device: the fraction of tokens with an active lower or upper bound, NaN without tokens."""
    sums = dict(zip(RAW, metrics.raw, strict=False))
    return (sums["clip_low"] + sums["clip_high"]) / sums["tokens"]


@cache
def say(text: str) -> None:
    """A warning, once."""
    warnings.warn(text, stacklevel=4)


def version_of(distribution: str) -> str | None:
    """Of what is imported, which may be a checkout that was never installed, else of what is installed."""
    loaded = getattr(sys.modules.get(distribution), "__version__", None)
    try:
        return loaded or metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def require(name: str) -> None:
    """ImportError where the host of a hook is missing or too old; a warning where it is newer than what was tried."""
    from packaging.version import Version

    host = HOSTS[name]
    accepted = f"{host.distribution} {host.oldest} to {host.newest} for {host.what}"
    found = version_of(host.distribution)
    if found is None:
        raise ImportError(f"{host.distribution}: got none, accepted: {accepted}")
    found = found.split("+")[0]  # without the commit of a checkout
    if Version(found) < Version(host.oldest):
        raise ImportError(f"{host.distribution}: got {found}, accepted: {accepted}")
    if Version(found) > Version(host.newest):
        warnings.warn(f"{host.distribution}: got {found}, held to {accepted}: compare a step", stacklevel=3)


def standing(name: str) -> str:
    """What require says of an installed host: "works", the warning, or the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            require(name)
        except ImportError as error:
            return str(error)
    return str(said[0].message) if said else "works"


def trainers() -> dict[str, dict[str, str]]:
    """The hosts that are installed: their version, the versions that a hook is held to, what it does, its standing."""
    found = {name: (host, version_of(host.distribution)) for name, host in HOSTS.items()}
    return {
        name: {"trainer": host.distribution, "here": here, "held_to": f"{host.oldest} to {host.newest}",
               "for": host.what, "standing": standing(name)}
        for name, (host, here) in found.items() if here
    }  # fmt: skip


def check_parameters(name: str, function: Callable[..., Any], accepted: tuple[str, ...] | Callable[..., Any]) -> None:
    """Whether a function of a host still takes what its stand-in takes: names, or the stand-in itself."""
    accepted = tuple(inspect.signature(accepted).parameters) if callable(accepted) else accepted
    found = tuple(inspect.signature(function).parameters)
    if found != accepted:
        raise wrong(name, f"the parameters ({', '.join(found)})", f"({', '.join(accepted)})")


def rebind(host: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """new[name] for old[name] in every loaded module of a host that holds that very object by the name."""
    for module in [m for name, m in sys.modules.items() if name == host or name.startswith(f"{host}.")]:
        for name in old:
            if module.__dict__.get(name) is old[name]:
                setattr(module, name, new[name])


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object, for a while."""
    had = name in vars(owner)
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own) if had else delattr(owner, name)
