"""The demo's task: chained sums with the running totals written out, "7+5+8=" -> "12,20.", one token per character.

Prompts are set flush right in a fixed width, blanks to the left, so that batches need no attention mask.
"""

import random
import zlib

import torch
from torch import Tensor

CHARACTERS = "0123456789+=,. "
END, BLANK = CHARACTERS.index("."), CHARACTERS.index(" ")
MIN_TERMS, MAX_TERMS = 3, 6
PROMPT_LENGTH = 2 * MAX_TERMS
RESPONSE_LENGTH = 3 * (MAX_TERMS - 1) + 1

Terms = tuple[int, ...]


def prompt(terms: Terms) -> str:
    """(7, 5, 8) -> "      7+5+8=", PROMPT_LENGTH characters."""
    return ("+".join(map(str, terms)) + "=").rjust(PROMPT_LENGTH)


def solution(terms: Terms, slip: float = 0.0, source: random.Random | None = None) -> str:
    """(7, 5, 8) -> "12,20."; with a probability of `slip` a total is off by one or two, and the later ones build on it."""
    total, totals = terms[0], []
    for term in terms[1:]:
        total += term
        if source is not None and source.random() < slip:
            total += source.choice((-2, -1, 1, 2))
        totals.append(str(total))
    return ",".join(totals) + "."


def reward(terms: Terms, response: str) -> float:
    """1 when the response ends in "." and the last number before it is the sum, else 0."""
    said, end, _ = response.partition(".")
    return float(end == "." and said.split(",")[-1] == str(sum(terms)))


def held_out(terms: Terms) -> bool:
    """Whether a problem belongs to the eighth of all problems that is never trained on."""
    return zlib.crc32(bytes(terms)) % 8 == 0


def problems(count: int, source: random.Random, evaluation: bool = False) -> list[Terms]:
    """Random problems with MIN_TERMS to MAX_TERMS terms of one digit, all from the held-out part or none."""
    found = []
    while len(found) < count:
        terms = tuple(source.randint(1, 9) for _ in range(source.randint(MIN_TERMS, MAX_TERMS)))
        if held_out(terms) == evaluation:
            found.append(terms)
    return found


def encode(texts: list[str], width: int) -> Tensor:
    """Token ids, int64 [len(texts), width], blanks to the right."""
    return torch.tensor([[CHARACTERS.index(c) for c in text.ljust(width)] for text in texts])


def decode(ids: Tensor) -> list[str]:
    """The texts of int64 [B, T]."""
    return ["".join(CHARACTERS[i] for i in row) for row in ids.tolist()]
