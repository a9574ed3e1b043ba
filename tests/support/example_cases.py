"""Examples of several ranks, without a launch of their own: as one process has them."""

import functools
import importlib.util

import torch.distributed as dist
from paths import ROOT


def as_on_one(name, group):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    found, expected = (example.train(some, steps=4) for some in (group, alone))
    assert found[-1] < found[0] - 0.01, found
    assert max(abs(x - y) for x, y in zip(found, expected, strict=True)) < 1e-9, (found, expected)


NAMES = ("tensor_parallel", "context_parallel")
CASES = {f"example, {name}": functools.partial(as_on_one, name) for name in NAMES}
