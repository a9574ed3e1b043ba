"""Which public names there are, and in which room each is at home."""

import functools
import importlib
import inspect
from types import ModuleType

import tokenrl

ROOMS = (
    "losses", "logprobs", "objectives", "fusion", "ops", "advantages", "methods", "distributed", "compat",
    "instruments",
)  # fmt: skip
BESIDE = ("tokenrl.distributed",)  # modules that `import tokenrl` leaves to those who need them


@functools.cache
def public_names() -> dict[str, object]:
    """Dotted path -> object: of tokenrl.__all__, and of the modules among them what these define."""
    found: dict[str, object] = {}
    modules = {f"tokenrl.{name}": getattr(tokenrl, name) for name in tokenrl.__all__}
    modules |= {name: importlib.import_module(name) for name in BESIDE}
    for path, thing in modules.items():
        found[path] = thing
        if isinstance(thing, ModuleType):
            found |= {f"{path}.{name}": getattr(thing, name) for name in names_of(thing)}
    return found


def names_of(module: ModuleType) -> list[str]:
    """__all__, or the functions and classes that the module defines."""
    own = [
        name
        for name, thing in vars(module).items()
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module.__name__
    ]
    return list(getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")])


def room_of(path: str, found: dict[str, object]) -> str:
    """The folder of tokenrl/ that defines a public name: of what is in a public module, that of the module; of a table,
    a dict, that of its rows."""
    module, thing = found.get(path.rpartition(".")[0]), found[path]
    if isinstance(module, ModuleType):
        thing = module
    if isinstance(thing, dict):
        row = next(iter(thing.values()))
        thing = row if inspect.isclass(row) else type(row)
    return (thing.__name__ if isinstance(thing, ModuleType) else str(thing.__module__)).split(".")[1]


def of_room(room: str) -> str:
    """A page's names: those of tokenrl itself, then those of each module."""
    every = public_names()
    found = {path: thing for path, thing in every.items() if room_of(path, every) == room}
    modules = [path for path, thing in found.items() if isinstance(thing, ModuleType)]
    plain = [path for path in found if path not in modules and path.rpartition(".")[0] not in modules]
    return "\n".join([listed(plain), *(of_module(path, found) for path in modules)])


def of_module(path: str, found: dict[str, object]) -> str:
    own = [name for name in found if name.rpartition(".")[0] == path]
    text = (inspect.getdoc(found[path]) or "").split("\n\n")[0]
    return f"\n## {path}\n\n{directive(f'.. py:module:: {path}')}\n\n{text}\n\n{listed(own)}"


def listed(paths: list[str]) -> str:
    return "\n".join(directive(described(path)) for path in sorted(paths, key=str.lower))


def described(path: str) -> str:
    thing, (module, _, name) = public_names()[path], path.rpartition(".")
    if inspect.isclass(thing):
        return f".. autoclass:: {path}\n   :members:"
    if callable(thing):
        return f".. autofunction:: {path}"
    head = f".. py:data:: {name}\n   :module: {module}"
    if isinstance(thing, dict):
        return f"{head}\n\n   A table: name -> row, {', '.join(f'``{row}``' for row in thing)}."
    return f"{head}\n   :value: {thing!r}"


def directive(text: str) -> str:
    return f"```{{eval-rst}}\n{text}\n```"
