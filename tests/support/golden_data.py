"""The files of tests/golden: inputs and outputs of the methods' official implementations, in fp64."""

import functools
import json

import numpy as np
import torch
from paths import GOLDEN
from torch import Tensor

INDEX = json.loads((GOLDEN / "index.json").read_text())
READ = []  # (family, case) of every case that a test has read, for account.py


@functools.cache
def _arrays(family: str):
    return np.load(GOLDEN / f"{family}.npz")


def arrays(family: str, case: str) -> dict[str, Tensor]:
    """The inputs and outputs of a case; floats become fp64, which holds every recorded number exactly."""
    READ.append((family, case))
    entry, stored = INDEX[family]["cases"][case], _arrays(family)
    found = {name: torch.from_numpy(stored[f"{case}/{name}"]) for name in entry["inputs"] + entry["outputs"]}
    return {name: x.double() if x.is_floating_point() else x for name, x in found.items()}


def near(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-9) -> None:
    """rtol, with an absolute term of 1e-12 of the largest entry for entries that cancel; infinities are the same."""
    assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, golden {list(expected.shape)}"
    found, expected = found.detach().cpu().double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(found[~finite], expected[~finite]), f"{what}: {found[~finite]}, golden {expected[~finite]}"
    if not finite.any():
        return
    found, expected = found[finite], expected[finite]
    error = (found - expected).abs()
    allowed = rtol * expected.abs() + 1e-12 * expected.abs().max()
    assert (error <= allowed).all(), (
        f"{what}: error {error.max():.3e} where the largest entry is {expected.abs().max():.3e}"
    )
