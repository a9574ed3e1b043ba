"""Whether a loss is the one it is meant to be: the tolerance rule, and a user's loss or a backend held to the fp64
reference by it, value and gradient."""

from .assertion import assert_parity
from .random_batch import random_batch
from .tolerance import ULPS, close, errors

__all__ = ["ULPS", "assert_parity", "close", "errors", "random_batch"]
