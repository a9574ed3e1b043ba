"""tokenrl's losses in verl's registry of policy losses, now or as soon as verl has imported it."""

import sys
from collections.abc import Mapping
from typing import Any

from ...batch.checks import check_name
from ...errors import wrong
from ...objectives.gates.kl import KlGate
from ...objectives.policy import OBJECTIVES, Objective, find_objective
from ..hosts import check_parameters, needed_by
from ..lazy import when_imported
from .batch import CORE
from .loss import PARAMETERS, host_loss, own_loss
from .modes import MODES, SETTINGS, nothing

_originals: dict[str, Any] = {}


def refusal(name: str, row: Objective) -> ValueError | None:
    """The error of a row that verl cannot feed."""
    needs = needed_by(row)
    if needs is None:
        return None
    return wrong("loss_mode", f"tokenrl_{name}, which needs {needs}", "a row of what verl hands to a policy loss")


def register(name: str, row: str | Objective | None = None, **parameters: Any) -> None:
    """loss_mode=tokenrl_<name> of verl: a row of the table (None: that of the name) or an Objective of yours, with any
    of its parameters changed. It is aggregated by verl's loss_agg_mode.

    A row given by its name that is a mode of verl's (ppo, grpo, dapo, dr_grpo, bnpo, gspo, gspo_token, sapo, cispo,
    gmpo, dro, clip_cov, kl_cov, dppo_*) takes what is not given here from verl's config: clip_ratio_low, tau_pos, ...

    Raises: ValueError for an unknown name or parameter, and for a row that verl cannot feed.
    """
    found = find_objective(name if row is None else row)
    refused = refusal(name, found)
    if refused is not None:
        raise refused
    settings = nothing if isinstance(row, Objective) else SETTINGS.get(found.name, nothing)
    _enter(own_loss(name, found, settings, parameters))


def _enter(loss: Any) -> None:
    when_imported(CORE, lambda core: core.register_policy_loss(loss.loss_mode)(loss))


def register_table(parameters: Mapping[str, Mapping[str, Any]]) -> None:
    """All policy rows, those that verl cannot feed too: asked for, these say why. parameters: by row."""
    for name, row in OBJECTIVES.items():
        if isinstance(row.gate, KlGate):
            continue
        refused = refusal(name, row)
        if refused is None:
            register(name, **parameters.get(name, {}))
        else:
            _enter(_Refused(f"tokenrl_{name}", refused))


class _Refused:
    def __init__(self, loss_mode: str, error: ValueError):
        self.loss_mode, self.error = loss_mode, error

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(str(self.error))


def replace(*modes: str) -> None:
    """verl's own loss modes by tokenrl, with verl's numbers; without names all that this verl has. Again: no effect.

    bypass_mode and rollout_correction call verl's functions, not the registry, and stay verl's.
    """
    for name in modes:
        check_name("mode", name, MODES)
    when_imported(CORE, lambda core: _replace(core.POLICY_LOSS_REGISTRY, modes))


def _replace(registry: dict[str, Any], modes: tuple[str, ...]) -> None:
    for name in modes:
        check_name("mode", name, registry)
    for name in modes or [name for name in MODES if name in registry]:
        if name not in _originals:
            check_parameters(f"verl's {name}", registry[name], PARAMETERS)
            _originals[name] = registry[name]
        registry[name] = host_loss(name, _originals[name])


def restore() -> None:
    """verl's own functions again."""
    if CORE in sys.modules:
        sys.modules[CORE].POLICY_LOSS_REGISTRY.update(_originals)
    _originals.clear()
