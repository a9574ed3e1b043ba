"""What waits for a module of a host. To import it from a hook takes seconds, in processes too that never train, and
within the host's own import it is not there yet."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]
_waiting: dict[str, list[Action]] = {}


class _Import(MetaPathFinder):
    """Does what waits for a module when that is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                for action in _waiting.pop(fullname, []):
                    action(module)
                if not _waiting and self in sys.meta_path:
                    sys.meta_path.remove(self)

            loader.exec_module = exec_module
        return spec


def when_imported(name: str, action: Action) -> None:
    """action(module) as soon as the module of that name is imported; at once where it is."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    _waiting.setdefault(name, []).append(action)
    if not any(isinstance(finder, _Import) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Import())
