"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
CPP_HOST = ROOT / "tests" / "kernels" / "cpp_host"
