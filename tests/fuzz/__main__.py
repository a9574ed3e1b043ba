"""python tests/fuzz --seconds 600: random calls against the fp64 reference, on each backend that runs here."""

import argparse
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]

import conftest  # noqa: E402, F401  (sets what holds for every test, before torch and triton are imported)
from cases import kernel_backends  # noqa: E402
from fuzz import fuzz  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seconds", type=float, default=600)
parser.add_argument(
    "--seed", type=int, default=int(time.time()), help="of the first round, which the others count from"
)
parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="where cases that fail are saved")
parser.add_argument("--backends", nargs="*", help="all that run here, if not given")
asked = parser.parse_args()
sys.exit(fuzz(asked.seconds, asked.seed, asked.folder, asked.backends or list(kernel_backends())) > 0)
