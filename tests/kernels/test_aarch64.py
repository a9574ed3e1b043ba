"""The CPU kernels for AArch64: cross-compiled by CMakeLists.txt, run under qemu, their loops on NEON's vectors."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from host_build import digest, headers
from made_once import made_once
from paths import ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
NEEDED = (COMPILER, "aarch64-linux-gnu-objdump", EMULATOR, "cmake", "make")
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
TESTS = sorted(path.stem for path in (ROOT / "tests" / "kernels" / "cpp").glob("*.cpp"))


def sources() -> str:
    folders = ROOT / "csrc" / "cpu", ROOT / "tests" / "kernels" / "cpp"
    paths = [ROOT / "CMakeLists.txt", *(path for folder in folders for path in sorted(folder.glob("*.cpp")))]
    return digest(headers(), *(path.read_text() for path in paths))


@functools.cache
def built() -> Path:
    def make(folder: Path) -> None:
        root = Path(shutil.which(COMPILER)).parents[1] / "aarch64-linux-gnu"
        settings = {
            "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": COMPILER,
            "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;{root}", "TOKENRL_CUDA": "OFF",
        }  # fmt: skip
        given = [f"-D{name}={value}" for name, value in settings.items()]
        run("cmake", "-S", ROOT, "-B", folder, *given)
        run("make", "-C", folder, "-j2")
        (folder / "ctest.txt").write_text(run("ctest", "--test-dir", folder))

    return made_once(ROOT / "build" / "aarch64" / sources(), make)


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("name", TESTS)
def test_it_passes_under_qemu(name):
    assert re.search(rf"{name}\.portable \.+ +Passed", (built() / "ctest.txt").read_text())


@functools.cache
def functions() -> dict[str, str]:
    """Their instructions by their names."""
    listing = run("aarch64-linux-gnu-objdump", "-dC", "--no-show-raw-insn", built() / "test_objective")
    named = re.split(r"^[0-9a-f]+ <(.*)>:$", listing, flags=re.M)
    return dict(zip(named[1::2], named[2::2], strict=True))


def on_vectors(text: str) -> int:
    return len(re.findall(r"\tf(?:mla|mls|mul|add|sub)\tv\d+\.4s", text))


def test_loops_are_on_vectors_of_four():
    loops = {name: text for name, text in functions().items() if "portable" in name and "gate_loop<float" in name}
    assert len(loops) > 20
    assert not [name for name, text in loops.items() if "false>" in name and on_vectors(text) < 5]


def test_canary_what_has_no_vectors_is_seen():
    assert on_vectors(functions()["main"]) == 0
