"""Run as a script: the real `import verl` in processes where nothing of it was, then of its core_algos; a line of JSON
for what each found.

verl's own files run. What verl imports and is not installed here is a stand-in that is named in the output: none of it
has a part in the plugin or the losses. Argument: JSON, per process [its environment, modules that verl's
import_external_libs loads afterwards]. They are forks of one that has imported torch and transformers.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import types

# What of verl's dependencies no test needs but its import; an installed one is taken.
OPTIONAL = ("ray", "tensordict", "omegaconf", "hydra", "codetiming", "torchdata", "pylatexenc", "wandb", "orjson")


class Anything(type):
    """A class that has every attribute, can be called, and decorates."""

    def __getattr__(cls, name):
        return attribute(name)

    def __call__(cls, *args, **kwargs):
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else cls


def attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    used: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in OPTIONAL:
            return None
        self.used.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__version__, module.__getattr__ = "0", attribute
        return module

    def exec_module(self, module):
        pass


def main(*external: str) -> None:
    sys.meta_path.append(StandIns())
    import verl

    core, plugin = "verl.trainer.ppo.core_algos", "tokenrl.integrations.verl"
    found = {"version": verl.__version__, "loaded": plugin in sys.modules, "heavy": core in sys.modules}
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.import_utils import import_external_libs

    import_external_libs(list(external))
    found["modes"] = {name: loss.__class__.__module__ for name, loss in core_algos.POLICY_LOSS_REGISTRY.items()}
    found["head"] = FusedLinearForPPO.forward.__module__
    found["logprobs"] = torch_functional.logprobs_from_logits.__module__
    found["stand-ins"] = sorted(StandIns.used)
    print(json.dumps(found), flush=True)


def each(ways: list[tuple[dict[str, str], list[str]]]) -> None:
    import torch  # noqa: F401
    import transformers.modeling_utils  # noqa: F401

    for environment, external in ways:
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                sys.exit(f"failed: {environment}, {external}")
            continue
        os.environ.update(environment)
        main(*external)
        sys.exit()


if __name__ == "__main__":
    each(json.loads(sys.argv[1]))
