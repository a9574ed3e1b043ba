"""`make fuzz`: rounds of random calls, each with a seed of its own. A case that fails is shrunk, printed, and saved as
a script that runs it alone."""

import time
from pathlib import Path

import hypothesis
from cases import interpreted
from fuzz_kinds import KINDS, reproduce
from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = 40  # of a round; the interpreter takes a hundred times as long
SCRIPT = """# {what}
# Found by `make fuzz`, round {seed}; run it from the root of the repository.
import sys

sys.path[:0] = ["tests", "tests/support"]
import conftest
from fuzz_kinds import reproduce

reproduce({kind!r}, {backend!r}, **{case!r})
"""


def one_round(kind: str, backend: str, seed: int, examples: int) -> tuple[int, dict, Exception | None]:
    """(cases tried, the last of them, its error): of those that fail the smallest is run last."""
    seen = []

    @hypothesis.seed(seed)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              report_multiple_bugs=False, phases=(Phase.generate, Phase.shrink))  # fmt: skip
    @given(**KINDS[kind][1])
    def tried(**case):
        seen.append(case)
        reproduce(kind, backend, **case)

    try:
        tried()
    except Exception as error:
        return len(seen), seen[-1], error
    return len(seen), seen[-1], None


def save(folder: Path, kind: str, backend: str, seed: int, case: dict, error: Exception) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path, what = folder / f"{kind}_{backend}_{seed}.py", " ".join(str(error).split())[:160]
    path.write_text(SCRIPT.format(what=what, seed=seed, kind=kind, backend=backend, case=case))
    return path


def fuzz(seconds: float, first: int, folder: Path, backends: list[str]) -> int:
    """How many rounds found a case that fails."""
    end, counts, failures, seed = time.monotonic() + seconds, {}, 0, first
    while time.monotonic() < end:
        for backend, kind in ((backend, kind) for backend in backends for kind in KINDS):
            if time.monotonic() > end:
                break
            count, case, error = one_round(kind, backend, seed, EXAMPLES // 10 if interpreted(backend) else EXAMPLES)
            counts[kind, backend] = counts.get((kind, backend), 0) + count
            if error is not None:
                failures += 1
                path = save(folder, kind, backend, seed, case, error)
                print(f"round {seed}: {kind} on {backend}, saved as {path}\n  {case}\n  {error}", flush=True)
        seed += 1
    print(f"rounds {first} to {seed - 1}: {sum(counts.values())} cases, {failures} rounds with one that fails")
    for (kind, backend), count in counts.items():
        print(f"  {kind} on {backend}: {count}")
    return failures
