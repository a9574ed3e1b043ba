"""Builds the native part with ninja: tokenrl/_ops.so (the op library, no Python in it) and tokenrl/_bindings
(pybind11).

TOKENRL_NATIVE=0 leaves it out, for a wheel of any machine. TOKENRL_CUDA=0|1|auto: CUDA kernels when nvcc is found,
whether or not there is a GPU. TORCH_CUDA_ARCH_LIST: their targets. What cannot be built is recorded as a reason in
tokenrl/_build.py, which `tokenrl doctor` prints; there too are the flags with which tokenrl.fuse compiles a gate.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
VERSION = "0.1.0"
ARCHITECTURES = "8.0;9.0;10.0+PTX;12.0"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11, the oldest supported
PER_ISA = (  # of csrc/cpu
    "divergence", "divergence_backward", "machine_limit_loops", "objective", "preference_sums", "token_logprobs",
    "token_logprobs_backward",
)  # fmt: skip
BESIDE = {  # packages that lie beside tokenrl/
    "tokenrl.triton_kernels": "triton_kernels",
    "tokenrl.bench": "bench",
    "tokenrl.csrc": "csrc",
}
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall"
NATIVE = os.environ.get("TOKENRL_NATIVE", "1") != "0"
ISAS = {"portable": ""}
if platform.machine() == "x86_64":
    ISAS["avx2"] = "-mavx2 -mfma"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"


def package_folder(name: str) -> Path | None:
    """Where a Python package lies, without importing it (torch takes seconds)."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec else None


def find_toolkit() -> dict[str, str] | None:
    """nvcc and its library folder, from CUDA_HOME or the PATH; None where there is none. nvcc knows its toolkit."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if not nvcc or not Path(nvcc).exists():
        return None
    log = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    ).stderr
    here = re.search(r"_HERE_=(\S+)", log)
    top = Path(here[1]).parent if here else Path(nvcc).parent.parent
    folders = [
        f for f in (top / "lib64", top / "lib", *top.glob("targets/*/lib")) if (f / "libcudart_static.a").exists()
    ]
    version = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return {"nvcc": nvcc, "lib": str(folders[0]), "version": version[1] if version else "?"} if folders else None


def cuda_toolkit() -> dict[str, str] | None:
    """The toolkit to use under TOKENRL_CUDA; SystemExit when it is demanded and missing."""
    wanted = os.environ.get("TOKENRL_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"TOKENRL_CUDA: got {wanted!r}, accepted: 0, 1, auto.")
    toolkit = None if wanted == "0" else find_toolkit()
    if wanted == "1" and toolkit is None:
        raise SystemExit("TOKENRL_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME or put nvcc on the PATH.")
    return toolkit


def architectures() -> list[str]:
    return (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(" ", ";").strip(";").split(";")


def gencode(archs: list[str]) -> str:
    """nvcc's targets: code for each architecture, and PTX where it says +PTX."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def ninja_path(path: Path) -> str:
    """A path as build.ninja spells it; ninja quotes it for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def shell_path(path: Path | str) -> str:
    """A path inside the flags of a build.ninja, which go to the shell as they are."""
    return shlex.quote(str(path)).replace("$", "$$")


class Ninja:
    """The text of a build.ninja."""

    def __init__(self, compiler: str, toolkit: dict[str, str] | None):
        # compiler: a command, maybe with arguments (CXX="ccache g++").
        dependencies = " depfile = $out.d\n deps = gcc\n"
        self.text = f"rule cxx\n command = {compiler} {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out\n{dependencies}"
        self.text += f"rule link\n command = {compiler} -shared -o $out $in $flags\n"
        if toolkit:
            cuda = "-std=c++17 -O3 -lineinfo --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
            nvcc = f"{shell_path(toolkit['nvcc'])} {cuda} {gencode(architectures())}"
            command = f"{nvcc} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)"
            self.text += f"rule nvcc\n command = {command}\n{dependencies}"

    def build(self, rule: str, out: Path, inputs: list[Path], flags: str = "", after: Path | None = None) -> Path:
        order = f" | {ninja_path(after)}" if after else ""
        self.text += f"build {ninja_path(out)}: {rule} {' '.join(map(ninja_path, inputs))}{order}\n flags = {flags}\n"
        return out


def op_library(ninja: Ninja, folder: Path, target: Path, torch: Path, toolkit: dict[str, str] | None) -> None:
    objects = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem not in PER_ISA:
            objects.append(ninja.build("cxx", folder / f"{source.stem}.o", [source]))
            continue
        for isa, flags in ISAS.items():
            compiled = folder / f"{source.stem}.{isa}.o"
            objects.append(ninja.build("cxx", compiled, [source], f"-DTOKENRL_ISA={isa} {flags}"))
    include = " ".join(
        f"-isystem {shell_path(torch / folder)}" for folder in ("include", "include/torch/csrc/api/include")
    )
    cuda = "-DTOKENRL_WITH_CUDA" if toolkit else ""
    objects.append(ninja.build("cxx", folder / "ops.o", [ROOT / "csrc" / "ops.cpp"], f"{include} {STABLE_ABI} {cuda}"))
    # The soname is what the bindings ask the loader for; without one they would ask for this path on the machine that
    # built them.
    libraries = f"-Wl,-soname,{target.name} -L{shell_path(torch / 'lib')} -ltorch_cpu -ldl"
    if toolkit:
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        objects += [ninja.build("nvcc", folder / f"{source.stem}.cu.o", [source]) for source in sources]
        libraries += f" -L{shell_path(toolkit['lib'])} -l:libcudart_static.a -lrt -lpthread"
    ninja.build("link", target, objects, libraries)


def bindings(ninja: Ninja, folder: Path, target: Path, ops: Path, toolkit: dict[str, str] | None) -> str | None:
    """Adds the pybind11 module, or says why it is left out."""
    python, pybind = Path(sysconfig.get_path("include")), package_folder("pybind11")
    if not (python / "Python.h").exists():
        return f"no Python.h in {python} (python3-dev)"
    if pybind is None:
        return "pybind11 is not installed"
    built = f"-DTOKENRL_CUDA_VERSION='\"{toolkit['version'] if toolkit else ''}\"'"
    built += f" -DTOKENRL_CUDA_ARCHITECTURES='\"{' '.join(architectures()) if toolkit else ''}\"'"
    built += f" -DTOKENRL_ISAS='\"{' '.join(ISAS)}\"'"
    flags = f"-isystem {shell_path(python)} -isystem {shell_path(pybind / 'include')} {built}"
    if toolkit:
        flags += " -DTOKENRL_WITH_CUDA"
    made = ninja.build("cxx", folder / "bindings.o", [ROOT / "csrc" / "bindings.cpp"], flags)
    ninja.build("link", target, [made], f"{shell_path(ops)} -Wl,-rpath,'$$ORIGIN'", after=ops)
    return None


def write_build(package: Path, native: str | None, bindings: str | None) -> None:
    (package / "_build.py").write_text(
        '"""Written by setup.py: why parts of the native code are missing, or None; its flags."""\n\n'
        f"NATIVE_REASON = {native!r}\nBINDINGS_REASON = {bindings!r}\n"
        f"CXX_FLAGS = {CXX_FLAGS!r}\nISA_FLAGS = {ISAS!r}\n"
    )


class BuildPython(build_py):
    """Under TOKENRL_NATIVE=0 there is no BuildNative to say why the native code is missing."""

    def run(self):
        super().run()
        if not NATIVE:
            package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "tokenrl"
            write_build(package, *["installed with TOKENRL_NATIVE=0"] * 2)


class BuildNative(build_ext):
    """One ninja run for both libraries; anything missing becomes a reason, unless it was demanded."""

    def run(self):
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "tokenrl"
        package.mkdir(parents=True, exist_ok=True)
        write_build(package, *self.build_native(package))

    def build_native(self, package: Path) -> tuple[str | None, str | None]:
        toolkit, torch, compiler = cuda_toolkit(), package_folder("torch"), os.environ.get("CXX") or shutil.which("g++")
        for missing, reason in (
            (compiler, "no C++ compiler: install g++ or set CXX"),
            (torch, "torch was not installed at build time"),
        ):
            if missing is None:
                print(f"tokenrl: no native code: {reason}", file=sys.stderr)
                return reason, reason
        folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}{'-cuda' if toolkit else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        ninja = Ninja(compiler, toolkit)
        ops = package / "_ops.so"
        op_library(ninja, folder, ops, torch, toolkit)
        without = bindings(ninja, folder, package / f"_bindings{sysconfig.get_config_var('EXT_SUFFIX')}", ops, toolkit)
        (folder / "build.ninja").write_text(ninja.text)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True, stdout=sys.stderr)
        if toolkit:
            logs = sorted(folder.glob("*.cu.o.log"))
            (ROOT / "build" / "ptxas.log").write_text("".join(log.read_text() for log in logs))
        return None, without

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "tokenrl").glob("_*")]


setup(
    version=VERSION,
    packages=[*find_packages(include=["tokenrl*"]), *BESIDE],
    package_dir={"tokenrl": "tokenrl", **BESIDE},
    py_modules=["tokenrl_pytest"],
    include_package_data=False,  # what MANIFEST.in lists is for the source distribution
    package_data={
        "tokenrl": ["py.typed", "instruments/profiling/*.jinja"],
        "tokenrl.bench": ["results/*.json"],
        "tokenrl.csrc": ["*.h", "*/*.h", "cpu/*.cpp", "fused/*.cpp"],  # tokenrl.fuse compiles them
    },
    # So that the wheel is a platform wheel; BuildNative knows the sources.
    ext_modules=[Extension("tokenrl._ops", sources=[])] if NATIVE else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
