"""The CUDA sources on the CPU, one fibre per CUDA thread: right, the same under every schedule, within their memory.

And the shim notices what it is there to notice.
"""

import re
import shutil
import subprocess

import host_build
import pytest
from paths import CPP_HOST, ROOT

pytestmark = pytest.mark.skipif(host_build.why_not() is not None, reason=str(host_build.why_not()))

PLAIN = ["-O1", "-g1"]
# Unoptimised: compiling takes longer than running.
SANITIZED = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
DRIVERS = {
    "shim": [],
    "objective": ["objective_float.cu", "objective_double.cu"],
    "parts": ["statistic.cu", "weights.cu"],
    "vocabulary": ["token_logprobs.cu", "token_logprobs_backward.cu"],
}
# Which driver notices a barrier that is missing in a file.
KERNELS = {
    "block.cuh": "objective",
    "spans.cuh": "objective",
    "weights.cu": "parts",
    "token_logprobs.cu": "vocabulary",
    "token_logprobs_backward.cu": "vocabulary",
}
BARRIER = "__syncthreads();"


def build(driver: str, flags: list[str], tree=ROOT):
    kernels = [tree / "csrc" / "cuda" / name for name in DRIVERS[driver]]
    drivers = host_build.compile_all([CPP_HOST / f"{driver}.cpp"], flags)
    return host_build.link(driver, host_build.compile_all(kernels, flags, tree) + drivers, flags)


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)


def test_every_cuda_source_has_a_driver():
    assert sorted(name for names in DRIVERS.values() for name in names) == [
        path.name for path in host_build.CUDA_SOURCES
    ]


@pytest.mark.parametrize("flags", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
@pytest.mark.parametrize("driver", DRIVERS)
def test_results_and_schedules(driver, flags):
    done = run(build(driver, flags))
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


def barriers() -> list[tuple[str, int]]:
    texts = {name: (ROOT / "csrc" / "cuda" / name).read_text() for name in KERNELS}
    return [(name, i) for name, text in texts.items() for i in range(text.count(BARRIER))]


@pytest.mark.parametrize("name, which", barriers())
def test_a_missing_barrier_is_caught(name, which, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / name
    text = path.read_text()
    start = [match.start() for match in re.finditer(re.escape(BARRIER), text)][which]
    path.write_text(text[:start] + text[start + len(BARRIER) :])
    done = run(build(KERNELS[name], PLAIN, tmp_path))
    assert done.returncode != 0, f"no schedule notices that barrier {which} of {name} is gone"
