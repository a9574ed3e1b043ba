"""What holds for every test; set before anything imports torch or triton."""

import importlib.util
import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker is a core; a test of threads sets their number itself

import pytest
import torch
from paths import ROOT

os.environ.setdefault("TOKENRL_CACHE", str(ROOT / "build" / "fused"))  # what tokenrl.fuse compiles, by its content

if not torch.cuda.is_available():  # then Triton's kernels run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if importlib.util.find_spec("triton"):
        import quick_interpreter

        quick_interpreter.install()

torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN: unwritten cells show

pytest_plugins = ["account", "known_limits", "noise", "order"]


@pytest.fixture(autouse=True)
def graphs_of_this_test_alone():
    """torch.compile counts its graphs of a function over the whole process, and stops at eight."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
