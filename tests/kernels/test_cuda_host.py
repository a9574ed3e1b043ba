"""The CUDA sources on the CPU, one fibre per CUDA thread: right, the same under every schedule, within their memory.

And the shim notices what it is there to notice.
"""

import os
import subprocess

import host_build
import pytest
from host_build import PLAIN
from paths import CPP_HOST, ROOT

pytestmark = pytest.mark.skipif(host_build.why_not() is not None, reason=str(host_build.why_not()))

# Unoptimised, and of a few gates: compiling takes longer than running.
SANITIZED = [
    "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
    "-DTOKENRL_GATES=std::tuple<Ratio, PpoClip, LogBand, Cispo, KlK3>",
]  # fmt: skip
DRIVERS = {
    "shim": [],
    "objective": ["objective_float.cu", "objective_double.cu", "statistic.cu"],
    "statistic": ["statistic.cu"],
    "position_adaptive_clip": ["position_adaptive_clip.cu"],
    "aggregation_weights": ["aggregation_weights.cu"],
    "divergence": ["divergence.cu", "divergence_backward.cu"],
    "preference": ["preference.cu"],
    "token_logprobs": ["token_logprobs.cu", "token_logprobs_backward.cu"],
}
# Which driver notices that a barrier of a file is missing.
KERNELS = {
    "block.cuh": "objective",
    "objective.cuh": "objective",
    "preference.cu": "preference",
    "spans.cuh": "objective",
    "aggregation_weights.cu": "aggregation_weights",
    "token_logprobs.cu": "token_logprobs",
    "token_logprobs_backward.cu": "token_logprobs",
}
BARRIER = "__syncthreads();"


def build(driver: str, flags: list[str]):
    """The program, built once for all tests that run it."""
    sources = [ROOT / "csrc" / "cuda" / name for name in DRIVERS[driver]] + [CPP_HOST / f"{driver}.cpp"]
    return host_build.link(driver, host_build.compile_all(sources, flags), flags)


def run(program, *arguments, **environment):
    env = os.environ | environment
    return subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_every_cuda_source_has_a_driver():
    driven = {name for names in DRIVERS.values() for name in names}
    assert driven == {path.name for path in host_build.CUDA_SOURCES}


@pytest.mark.long
@pytest.mark.parametrize("driver", DRIVERS)
def test_results_and_schedules(driver):
    done = run(build(driver, SANITIZED))
    assert done.returncode == 0 and "all as expected" in done.stdout, done.stdout + done.stderr


def test_every_gate_under_every_schedule():
    done = run(build("objective", PLAIN))
    assert done.returncode == 0 and "all as expected" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "mistake, message",
    {
        "barrier": "deadlock",
        "mask": "leaves out the calling lane",
        "finished": "names a lane that has finished",
        "operations": "different warp operations",
    }.items(),
)
def test_shim_reports(mistake, message):
    done = run(build("shim", PLAIN), mistake)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize("driver, argument", [("objective", "short"), ("shim", "shared")])
def test_reads_and_writes_out_of_bounds_are_reported(driver, argument):
    done = run(build(driver, SANITIZED), argument)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def barriers() -> list[str]:
    """FILE:LINE of each."""
    texts = {name: (ROOT / "csrc" / "cuda" / name).read_text().split("\n") for name in KERNELS}
    return [f"{name}:{i}" for name, lines in texts.items() for i, line in enumerate(lines, 1) if BARRIER in line]


@pytest.mark.parametrize("place", barriers())
def test_a_missing_barrier_is_caught(place):
    """In the program that is right with all of its barriers."""
    done = run(build(KERNELS[place.split(":")[0]], PLAIN), TOKENRL_WITHOUT_BARRIER=place)
    assert done.returncode != 0, f"no schedule notices that the barrier in {place} is gone"
