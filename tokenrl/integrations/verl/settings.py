"""What a process of verl does when it loads the plugin, by an environment variable: verl's configs take no more fields
than verl's."""

import json
import logging
import os
from typing import Any

from ...errors import unknown, wrong
from ...objectives.policy import OBJECTIVES, objective
from ..hosts import require
from .head import fuse, patch
from .registry import register_table, replace

VARIABLE = "TOKENRL_VERL"
FORM = """a JSON object as {"ctpo": {"eps_low": 0.03}, "replace": true}"""
SWITCHES = {"replace": replace, "fuse": fuse, "patch": patch}


def read(text: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(parameters by objective, the switches that are on)."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        raise wrong(VARIABLE, text, FORM) from None
    if not isinstance(given, dict):
        raise wrong(VARIABLE, text, FORM)
    parameters = {name: value for name, value in given.items() if name not in SWITCHES}
    for name, value in parameters.items():
        if name not in OBJECTIVES:
            raise unknown(VARIABLE, name, (*OBJECTIVES, *SWITCHES))
        if not isinstance(value, dict):
            raise wrong(f"{VARIABLE}: {name}", value, "an object of parameters")
        objective(name, **value)
    for name in SWITCHES:
        if given.get(name, False) not in (True, False):
            raise wrong(f"{VARIABLE}: {name}", given[name], "true or false")
    return parameters, [name for name in SWITCHES if given.get(name)]


def install() -> None:
    """What a process does with the plugin. verl hides what a plugin raises, so it is logged too."""
    try:
        require("verl")
        parameters, switches = read(os.environ.get(VARIABLE, ""))
        register_table(parameters)
        for name in switches:
            SWITCHES[name]()
    except Exception as error:
        logging.getLogger("tokenrl").error("tokenrl.integrations.verl is not loaded: %s", error)
        raise
