"""TRL's log-prob and entropy functions by tokenrl.compat, wherever TRL has imported them."""

import sys
from typing import Any

from ... import compat
from ..hosts import require

NAMES = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")
_originals: dict[str, Any] = {}


def _rebind(old: dict[str, Any], new: dict[str, Any]) -> None:
    for module in [m for name, m in sys.modules.items() if name == "trl" or name.startswith("trl.")]:
        for name in old:
            if module.__dict__.get(name) is old[name]:
                setattr(module, name, new[name])


def patch_trl() -> None:
    """selective_log_softmax, selective_log_softmax_and_entropy and entropy_from_logits of TRL become tokenrl.compat's,
    in every module of TRL that is loaded and in those that will import them from trl.trainer.utils. Again: no effect,
    but for modules loaded since."""
    require("trl")
    from trl.trainer import utils

    if not _originals:
        _originals.update({name: getattr(utils, name) for name in NAMES if hasattr(utils, name)})
    _rebind(_originals, {name: getattr(compat, name) for name in _originals})


def unpatch_trl() -> None:
    """TRL's own functions again."""
    _rebind({name: getattr(compat, name) for name in _originals}, _originals)
    _originals.clear()
