"""Late chunking (Günther et al., 2024): one long text is read whole, then each of its parts is pooled on its own."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fundament.core import Array

_LEAST_ROOM = 32
"""Fewest tokens of text in a window: a chunk's vector needs some text around it to be worth the reading."""

# Marks that end a sentence where a blank follows, then marks that end it anywhere, then line ends. Possessive, and from
# the first mark of a run only, so that a text of nothing but marks is read in one pass.
_END = re.compile(
    r"(?<![.!?…؟۔।])[.!?…؟۔।]++[\"'”’»)\]]*+(?=\s++(\S)|\s*+\Z)"  # noqa: RUF001
    r"|[。！？｡]++[”’」』）]*+"  # noqa: RUF001
    r"|(?<=\S)(?=[^\S\n]*+\n)"
)


def sentences(text: str) -> list[str]:
    """Divide a text after `.` `!` `?` and their like, and at line ends; joined, the sentences are the text.

    Blanks go to the sentence that follows them. A mark before a small letter ends nothing; `Dr. Smith` is divided.
    """
    ends = [match.end() for match in _END.finditer(text) if not (match[1] or "").islower()]
    found, start = [], 0
    for stop in ends:
        if stop > start:
            found.append(text[start:stop])
            start = stop
    rest = text[start:]
    if rest.strip():
        return [*found, rest]
    return [*found[:-1], found[-1] + rest] if found else []


@dataclass(frozen=True, slots=True)
class Joint:
    """Several parts as one sequence of token ids, special tokens left out.

    Attributes:
        ids: int64 `[tokens]`: the prompt's, then each part's.
        borders: where each part begins, and the end, `[parts + 1]`; the prompt lies before the first.
    """

    ids: Array
    borders: Array


@dataclass(frozen=True, slots=True)
class Window:
    """What one row reads of a joint text, the prompt and special tokens aside.

    Attributes:
        start: its first token.
        stop: one past its last.
        first: the first token whose state is taken from here.
        last: one past the last.
    """

    start: int
    stop: int
    first: int
    last: int


def windows(n_tokens: int, room: int) -> list[Window]:
    """Cover so many tokens by windows of at most `room`, neighbours sharing a quarter of it.

    A token that two windows read is taken from the one in which it is farther from an end.
    """
    if n_tokens <= room:
        return [Window(0, n_tokens, 0, n_tokens)]
    stride = room - room // 4
    starts = [*range(0, n_tokens - room, stride), n_tokens - room]
    middles = [(start + room + following) // 2 for start, following in pairwise(starts)]
    borders = pairwise([0, *middles, n_tokens])
    return [Window(start, start + room, *border) for start, border in zip(starts, borders, strict=True)]


def least_window(n_around: int) -> int:
    """The smallest window that is served where the prompt and the special tokens take `n_around`."""
    return n_around + _LEAST_ROOM


def cut(borders: Array, first: int, last: int) -> tuple[Array, Array]:
    """The parts that have tokens in `first:last`, int64 `[k]`, and their borders there, int64 `[k + 1]`."""
    inside = np.clip(borders, first, last)
    parts = np.flatnonzero(np.diff(inside))
    return parts, np.append(inside[parts], inside[parts[-1] + 1] if len(parts) else first)


def merge(n_parts: int, rows: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Each part's mean over all its tokens, float32 `[parts, dim]`.

    Args:
        n_parts: how many there are; each has tokens in some row.
        rows: of each row, which parts it holds, their borders, and their means `[k, dim]`.
    """
    sums, n_tokens = np.zeros((n_parts, rows[0][2].shape[1]), dtype=np.float32), np.zeros(n_parts, dtype=np.int64)
    for parts, borders, means in rows:
        lengths = np.diff(borders)
        sums[parts] += means * lengths[:, None].astype(np.float32)
        n_tokens[parts] += lengths
    return sums / n_tokens[:, None].astype(np.float32)
