"""The hosts, the versions that their hooks are held to, and the check of what is installed."""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ..errors import wrong
from ..objectives.gates.kl import KlGate
from ..objectives.policy import Objective


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
}


NEEDS = {  # what hosts do not hand to a policy loss
    "ba": "group ids", "real": "group ids", "fiberpo_domain": "group ids", "sspo": "segment ids",
    "hapo": "entropy scores", "rmt": "a next-token weight", "dppo_topk": "top-K divergences",
}  # fmt: skip


def needed_by(row: Objective) -> str | None:
    """What a row needs beside log-probs, advantages and mask; None: nothing."""
    if isinstance(row.gate, KlGate):
        return "a reference's log-probs"
    return NEEDS.get(row.name, "group ids" if row.aggregation in ("group-mean", "balanced") else None)


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
    if Version(found) < Version(host.oldest):
        raise ImportError(f"{host.distribution}: got {found}, accepted: {accepted}")
    if Version(found) > Version(host.newest):
        warnings.warn(f"{host.distribution}: got {found}, held to {accepted}: compare a step", stacklevel=3)


def check_parameters(name: str, function: Callable[..., Any], accepted: tuple[str, ...]) -> None:
    """Whether a function of a host still takes what its stand-in takes."""
    found = tuple(inspect.signature(function).parameters)
    if found != accepted:
        raise wrong(name, f"the parameters ({', '.join(found)})", f"({', '.join(accepted)})")


def rebind(host: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """new[name] for old[name] in every loaded module of a host that holds that very object by the name."""
    for module in [m for name, m in sys.modules.items() if name == host or name.startswith(f"{host}.")]:
        for name in old:
            if module.__dict__.get(name) is old[name]:
                setattr(module, name, new[name])
