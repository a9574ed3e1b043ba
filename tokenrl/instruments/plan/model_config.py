"""The head of a model, by the config.json that transformers writes beside it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...errors import unknown, wrong
from .model import Shape

HIDDEN, VOCAB, DTYPE = ("hidden_size", "n_embd", "d_model"), ("vocab_size",), ("dtype", "torch_dtype")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class ModelHead(NamedTuple):
    """dtype: None where the file has none. tied: the head is the embedding."""

    hidden: int
    vocab: int
    dtype: str | None
    tied: bool


def dtype_of(name: str) -> torch.dtype:
    """bf16, bfloat16, torch.bfloat16 and the like; ValueError, with the nearest, for others."""
    short = LONG.get(name.removeprefix("torch."), name)
    if short not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[short]


def shape_of(tokens: int, hidden: int | None, vocab: int | None, dtype: str | None, head: ModelHead | None) -> Shape:
    """Of a plan: numbers that are given, else the model's; ValueError where neither says."""
    found = {"hidden": hidden or (head and head.hidden), "vocab": vocab or (head and head.vocab)}
    for name, number in found.items():
        if not number:
            raise wrong(name, None, f"--{name} N, or --model config.json")
    wanted = dtype or (head and head.dtype) or "bf16"
    return Shape(tokens, int(found["hidden"] or 0), int(found["vocab"] or 0), dtype_of(wanted))


def read(path: Path) -> ModelHead:
    """The head that a config.json, or the one in a folder, describes; that of the text model of several."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise wrong("model", f"{file}, no JSON ({error})", "a config.json as transformers writes it") from None
    parts = list(_parts(config))
    hidden, vocab = (_first(parts, names) for names in (HIDDEN, VOCAB))
    if not (isinstance(hidden, int) and isinstance(vocab, int)):
        missing = " and ".join(n[0] for n, x in ((HIDDEN, hidden), (VOCAB, vocab)) if not isinstance(x, int))
        raise wrong("model", f"{file} without {missing}", "a config.json as transformers writes it")
    dtype = _first(parts, DTYPE)
    return ModelHead(
        hidden, vocab, dtype if isinstance(dtype, str) else None, bool(_first(parts, ("tie_word_embeddings",)))
    )


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """Those of a config that may describe the text model, it first."""
    if isinstance(config, dict):
        yield from (
            part for name, part in config.items() if name.startswith(("text", "llm")) and isinstance(part, dict)
        )
        yield config


def _first(parts: list[Mapping[str, Any]], names: tuple[str, ...]) -> Any:
    return next((part[name] for part in parts for name in names if part.get(name) is not None), None)
