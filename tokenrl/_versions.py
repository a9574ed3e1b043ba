"""The versions that tokenrl supports, checked once at import."""

import importlib.metadata
import sys

import torch

PYTHON = ((3, 10), (3, 13))
TORCH = ((2, 11), (2, 13))
TRITON = (3, 6)  # the oldest; it is optional


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_versions(python: tuple[int, int] = sys.version_info[:2], torch_version: str = torch.__version__) -> None:
    """ImportError when Python or torch is outside what this version of tokenrl is built and tested for."""
    found = tuple(int(part) for part in torch_version.split(".")[:2])
    for name, version, (lowest, highest) in (("Python", python, PYTHON), ("torch", found, TORCH)):
        if not lowest <= tuple(version) <= highest:
            raise ImportError(
                f"tokenrl supports {name} {_text(lowest)} to {_text(highest)}; this is {name} {_text(tuple(version))}."
            )


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
