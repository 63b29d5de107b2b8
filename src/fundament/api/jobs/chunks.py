"""Chunks of a batch job's input: where they begin and end, found without reading what is in their lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fundament.jsonl import MOST_LINE_BYTES, InputFileError
from fundament.store.leases import Span

# A chunk is what a worker takes at a time, and what is done again when it dies.
_CHUNK_LINES, _CHUNK_BYTES = 256, 256 * 1024


def divide(path: Path, *, max_lines: int) -> list[Span]:
    """Find the chunks of an input.

    Raises:
        InputFileError: no lines, or too many.
    """
    spans: list[Span] = []
    start = n_bytes = first = n_lines = 0
    with path.open("rb") as file:
        for size, is_empty in _sizes(file):
            if n_lines and (n_lines == _CHUNK_LINES or n_bytes + size > _CHUNK_BYTES):
                spans.append(Span(start=start, n_bytes=n_bytes, first_line=first, n_lines=n_lines))
                start, first, n_bytes, n_lines = start + n_bytes, first + n_lines, 0, 0
            if is_empty and not n_lines:
                start += size
                continue
            n_bytes += size
            n_lines += not is_empty
            check_lines(first + n_lines, max_lines)
    if n_lines:
        spans.append(Span(start=start, n_bytes=n_bytes, first_line=first, n_lines=n_lines))
    if not spans:
        raise InputFileError("The input has no lines.")
    return spans


def check_lines(n_lines: int, most: int) -> None:
    """Refuse an input of too many lines.

    Raises:
        InputFileError: there are more than `most`.
    """
    if n_lines > most:
        raise InputFileError(f"The input has more than {most:,} lines. Divide it into several jobs.")


def _sizes(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Of each line the size in bytes and whether nothing is in it; no line is in memory whole that is too long."""
    while raw := file.readline(MOST_LINE_BYTES + 1):
        size, is_empty = len(raw), len(raw) <= MOST_LINE_BYTES and not raw.strip()
        while not raw.endswith(b"\n") and (raw := file.readline(MOST_LINE_BYTES)):
            size += len(raw)
        yield size, is_empty


def one_by_one(raw: bytes, span: Span) -> list[Span]:
    """The lines of a chunk as chunks of their own; `raw` is its part of the input."""
    spans: list[Span] = []
    start = span.start
    for line in raw.split(b"\n"):
        if line.strip():
            first = span.first_line + len(spans)
            spans.append(Span(start=start, n_bytes=len(line), first_line=first, n_lines=1))
        start += len(line) + 1
    return spans
