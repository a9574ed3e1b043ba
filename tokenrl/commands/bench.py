"""`tokenrl bench`, which is `python -m bench`, installed."""

from ..bench.__main__ import main as bench

__all__ = ["bench"]
