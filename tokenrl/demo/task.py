"""The demo's task: the running totals, modulo five, of a row of digits, one character each: "3142=" -> "3430.".

Prompts are filled with blanks to a fixed width, so that batches need no attention mask.
"""

import random
import zlib

import torch
from torch import Tensor

MODULUS = 5
CHARACTERS = "01234=. "
END, BLANK = CHARACTERS.index("."), CHARACTERS.index(" ")
MIN_TERMS, MAX_TERMS = 4, 12
PROMPT_LENGTH = MAX_TERMS + 1
RESPONSE_LENGTH = MAX_TERMS + 1

Terms = tuple[int, ...]


def prompt(terms: Terms) -> str:
    """(3, 1, 4, 2) -> "3142=        ", PROMPT_LENGTH characters."""
    return ("".join(map(str, terms)) + "=").ljust(PROMPT_LENGTH)


def solution(terms: Terms) -> str:
    """(3, 1, 4, 2) -> "3430."."""
    return "".join(str(sum(terms[: i + 1]) % MODULUS) for i in range(len(terms))) + "."


def reward(terms: Terms, response: str) -> float:
    """1 when the response up to its first "." is right in every total, else 0."""
    return float(response.partition(".")[0] + "." == solution(terms) and "." in response)


def held_out(terms: Terms) -> bool:
    """Whether a problem belongs to the eighth of all problems that is never trained on."""
    return zlib.crc32(bytes(terms)) % 8 == 0


def problems(count: int, source: random.Random, evaluation: bool = False) -> list[Terms]:
    """Random problems with MIN_TERMS to MAX_TERMS digits, all from the held-out part or none."""
    found: list[Terms] = []
    while len(found) < count:
        terms = tuple(source.randrange(MODULUS) for _ in range(source.randint(MIN_TERMS, MAX_TERMS)))
        if held_out(terms) == evaluation:
            found.append(terms)
    return found


def encode(texts: list[str], width: int) -> Tensor:
    """Token ids, int64 [len(texts), width], blanks to the right."""
    return torch.tensor([[CHARACTERS.index(c) for c in text.ljust(width)] for text in texts])


def decode(ids: Tensor) -> list[str]:
    """The texts of int64 [B, T]."""
    return ["".join(CHARACTERS[i] for i in row) for row in ids.tolist()]
