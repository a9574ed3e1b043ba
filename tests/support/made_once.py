"""Files that are made once, by whichever process comes first."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """target, which make(an unfinished path beside it) makes whole or not at all; other test workers wait for it."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.{os.getpid()}")
            make(unfinished)
            unfinished.replace(target)
    return target
