"""Every row of every table of objectives: `tokenrl objectives`, and the pages of docs/objectives."""

from ...batch.checks import check_name
from ...errors import wrong
from ...objectives.policy import Objective
from . import distillation, policy, preference, unlearning
from .entry import Entry
from .policy import entry_of

__all__ = ["FAMILIES", "Entry", "entries", "entry_of", "find_entry", "selected"]

# In the order of the pages.
FAMILIES = {
    "clip": "Ratios of single tokens, bounded",
    "weighted": "Ratios of single tokens as weights",
    "prefix": "Ratios of prefixes",
    "sequence": "Ratios of sequences and segments",
    "form": "Tokens that meet in other ways",
    "kl": "Estimates of a KL",
    "preference": "Preferences",
    "distillation": "Distillation",
    "divergence": "Divergences of two heads",
    "unlearning": "Unlearning",
}


def entries() -> list[Entry]:
    """All rows, those of one family together."""
    found = [*policy.entries(), *preference.entries(), *distillation.entries(), *unlearning.entries()]
    order = list(FAMILIES)
    return sorted(found, key=lambda entry: order.index(entry.family))


def find_entry(name: str | Objective) -> Entry:
    """The row of that name; a policy objective that is in no table is its own entry."""
    if isinstance(name, Objective):
        return entry_of(name)
    found = {entry.name: entry for entry in entries()}
    check_name("objective", name, found)
    return found[name]


def selected(family: str = "", paper: str = "", search: str = "") -> list[Entry]:
    """Those of a family, of a paper by its arXiv number, and with a text in name, formula or source. ValueError for a
    family that is none, and where nothing is left."""
    if family:
        check_name("family", family, FAMILIES)
    found = [entry for entry in entries() if family in ("", entry.family)]
    found = [entry for entry in found if not paper or paper in entry.papers]
    found = [entry for entry in found if search.lower() in f"{entry.text}\n{entry.source}".lower()]
    if not found:
        asked = {"family": family, "paper": paper, "search": search}
        given = ", ".join(f"{name} {text!r}" for name, text in asked.items() if text)
        raise wrong("objectives", given, "what some row has; `tokenrl objectives` lists them all")
    return found
