"""tokenrl doctor: each thing that keeps a machine from a faster backend is found with its remedy, and nothing else."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from tokenrl import cli
from tokenrl.instruments import doctor, remedies
from tokenrl.instruments.remedies import Machine
from tokenrl.ops import backends

# A machine on which everything runs; each case changes it.
WHOLE = Machine(
    gpus=(("NVIDIA H200", (9, 0)),), gpu_device=True, torch_cuda="13.0", driver=(13, 0), runtime=(13, 0),
    architectures=("8.0", "9.0", "10.0+PTX"), triton=(3, 6), compiler="/usr/bin/c++", nvcc="/usr/bin/nvcc",
)  # fmt: skip
NO_GPU = dataclasses.replace(WHOLE, gpus=(), gpu_device=False, torch_cuda=None, driver=None)
# Name: (the machine, what the remedy is about, words of the reason, words of the remedy).
CASES = {
    "no native code": ({"native": "it is not built"}, "backends cpu and cuda", "not built", "pip install"),
    "no compiler": (
        {"native": "no C++ compiler", "compiler": None, "gpus": (), "gpu_device": False}, "backends cpu and cuda",
        "no C++ compiler", "apt-get install g++",
    ),
    "left out": (
        {"native": "installed with TOKENRL_NATIVE=0"}, "backends cpu and cuda", "TOKENRL_NATIVE=0",
        "without TOKENRL_NATIVE in the environment",
    ),
    "torch of the CPU": (
        {"gpus": (), "torch_cuda": None}, "torch", "without CUDA, beside an NVIDIA GPU", "download.pytorch.org/whl/cu",
    ),
    "torch too new": ({"gpus": (), "driver": (12, 4)}, "torch", "(its driver: CUDA 12.4)", "update the NVIDIA driver"),
    "no driver": ({"gpus": (), "driver": None}, "torch", "(its driver: CUDA not found)", "update the NVIDIA driver"),
    "no kernels": ({"cuda": "built without CUDA", "runtime": None, "architectures": ()}, "backend cuda",
                   "built without CUDA", "TOKENRL_CUDA=1 pip install"),
    "no nvcc": ({"cuda": "built without CUDA", "runtime": None, "architectures": (), "nvcc": None}, "backend cuda",
                "built without CUDA", "install the CUDA toolkit (nvcc; CUDA_HOME names its folder), then TOKENRL"),
    "driver too old": (
        {"driver": (12, 8)}, "NVIDIA driver", "can CUDA 12.8, the kernels have the runtime of 13.0",
        "update the driver to 580.65 or newer, or with an nvcc of CUDA 12:",
    ),
    "no kernel image": (
        {"gpus": (("Tesla T4", (7, 5)),)}, "Tesla T4", "no kernel image for its compute capability 7.5",
        "TORCH_CUDA_ARCH_LIST=7.5 TOKENRL_CUDA=1",
    ),
    "an older image of a newer GPU": (
        {"architectures": ("8.0",)}, "NVIDIA H200", "no kernel image for its compute capability 9.0: built for 8.0",
        "TORCH_CUDA_ARCH_LIST=9.0",
    ),
    "PTX alone": (
        {"gpus": (("RTX 5090", (12, 0)),)}, "RTX 5090", "only PTX for its compute capability 12.0",
        "TORCH_CUDA_ARCH_LIST=12.0",
    ),
    "old Triton": ({"triton": (3, 5)}, "triton", "3.5 is older than 3.6", "pip install 'triton>=3.6'"),
    "new numpy": ({"numpy": (2, 4)}, "triton", "fails with numpy 2.4", "numpy<2.4"),
    "no Triton": (
        {"triton": None, "triton_backend": "triton is not installed"}, "backend triton", "not installed",
        "pip install 'triton>=3.6'",
    ),
    "Triton in its interpreter": (
        {"triton_backend": "TRITON_INTERPRET changed"}, "backend triton", "changed", "unset TRITON_INTERPRET",
    ),
    "no compiler for Triton": (
        {"compiler": None}, "backend triton", "its launcher at the first call, which needs a C compiler", "gcc",
    ),
    "no headers for Triton": ({"headers": False}, "backend triton", "which needs Python.h", "python3-dev"),
    "no bindings": (
        {"bindings": "no Python.h in /usr/include", "headers": False, "gpus": (), "gpu_device": False},
        "tokenrl._bindings", "no Python.h", "apt-get install python3-dev, then pip install",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_missing_has_its_remedy(name):
    changes, what, why, remedy = CASES[name]
    found = remedies.remedies(dataclasses.replace(WHOLE, **changes))
    assert [one.what for one in found] == [what]
    assert why in found[0].why and remedy in found[0].remedy


def test_where_nothing_is_missing_nothing_is_named():
    fine = [
        WHOLE, NO_GPU, dataclasses.replace(WHOLE, gpus=(("RTX 4090", (8, 9)),)),
        dataclasses.replace(WHOLE, driver=(13, 2), triton=(3, 9), numpy=(2, 5)),
        dataclasses.replace(WHOLE, driver=(12, 0), runtime=(12, 8)),
        dataclasses.replace(WHOLE, torch_cuda=None, cuda="built without CUDA", runtime=None, architectures=()),
        dataclasses.replace(NO_GPU, triton=None, triton_backend="triton is not installed", compiler=None),
    ]  # fmt: skip
    assert [remedies.remedies(machine) for machine in fine] == [[]] * len(fine)


@pytest.mark.parametrize(
    "capability, found",
    [((8, 0), "code"), ((8, 9), "code"), ((9, 0), "code"), ((10, 3), "code"), ((12, 0), "PTX"), ((7, 5), None)],
)
def test_which_image_a_gpu_finds(capability, found):
    assert remedies.image(("8.0", "9.0", "10.0+PTX"), capability) == found


def test_versions_are_read():
    assert remedies.version_of("2.13.0+cpu") == (2, 13) and remedies.version_of("3.10") == (3, 10)
    assert remedies.version_of(None) is None and remedies.version_of("unknown") is None


def called(*arguments: str, width: int = 80):
    return CliRunner().invoke(cli.application(), ["doctor", *arguments], env={"COLUMNS": str(width)})


def test_json_has_all_of_it():
    found = json.loads(called("--json").stdout)
    assert set(found) >= {"versions", "build", "backends", "fastest", "remedies"}
    assert found["fastest"]["cpu"] == backends.choose(None, torch.device("cpu")).name
    assert (
        found["backends"]["reference"]["cpu"] == "can run" and found["versions"]["torch"]["here"] == torch.__version__
    )
    assert found["remedies"] == [dataclasses.asdict(one) for one in remedies.remedies(remedies.here())]


def test_remedies_are_printed_as_they_are(monkeypatch):
    monkeypatch.setattr(doctor, "here", lambda: dataclasses.replace(WHOLE, native="no compiler [c++] was found"))
    outcome = called()
    assert outcome.exit_code == 0 and all(len(line) <= 80 for line in outcome.output.splitlines())
    text = " ".join(outcome.output.split())
    assert "backends cpu and cuda: no compiler [c++] was found" in text and remedies.REBUILD in text
    monkeypatch.setattr(doctor, "here", lambda: WHOLE)
    assert "nothing is missing for a faster one" in called().output


def test_the_order_that_it_names_is_the_order_of_the_choice():
    order = list(backends.BACKENDS)
    assert "on a GPU cuda before triton" in called().output and order.index("cuda") < order.index("triton")
