"""What a command prints: JSON, for other programs."""

import json
import math
from typing import Any


def print_json(found: Any) -> None:
    """On standard output. NaN and infinities, which JSON has not, as null."""
    print(json.dumps(finite(found), indent=1, allow_nan=False))


def finite(x: Any) -> Any:
    """x, its numbers that are none replaced by None."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
