"""TRL's log-prob and entropy functions by tokenrl.compat, wherever TRL has imported them."""

from typing import Any

from ... import compat
from ..hosts import rebind, require

NAMES = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")
_originals: dict[str, Any] = {}


def patch_trl() -> None:
    """selective_log_softmax, selective_log_softmax_and_entropy and entropy_from_logits of TRL become tokenrl.compat's,
    in every module of TRL that is loaded and in those that will import them from trl.trainer.utils. Again: no effect,
    but for modules loaded since."""
    require("trl")
    from trl.trainer import utils

    if not _originals:
        _originals.update({name: getattr(utils, name) for name in NAMES if hasattr(utils, name)})
    rebind("trl", _originals, {name: getattr(compat, name) for name in _originals})


def unpatch_trl() -> None:
    """TRL's own functions again."""
    rebind("trl", {name: getattr(compat, name) for name in _originals}, _originals)
    _originals.clear()
