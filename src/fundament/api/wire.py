"""Writing answers: NumPy goes out through orjson, a large answer in slices between which the event loop turns."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import orjson
from starlette.responses import Response

T = TypeVar("T")

_OPTIONS = orjson.OPT_SERIALIZE_NUMPY
_SLICE_NUMBERS = 64 * 1024  # numbers written at a time, so that the event loop turns in between


def json_bytes(value: Any) -> bytes:
    """A value as JSON; NumPy arrays become lists of numbers."""
    return orjson.dumps(value, option=_OPTIONS)


def can_write(value: Any) -> bool:
    """Whether what was read from JSON can be written as JSON again: orjson writes fewer levels than it reads."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


def iso(moment: datetime) -> str:
    """A moment in UTC as ISO 8601 has it, to the second."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A small JSON answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def written(body: bytes, n_truncated: int) -> Response:
    """A JSON answer that is written already, and how many inputs were cut for it."""
    return Response(body, headers={"X-Truncated-Inputs": str(n_truncated)}, media_type="application/json")


async def long_answer(
    head: dict[str, Any], key: str, rows: Sequence[T], row: Callable[[int, T], Any], *, numbers_per_row: int
) -> bytes:
    """`head` with one more key, last, that holds a list of `row(place, value)`.

    Args:
        head: the answer's other keys, in order.
        key: the list's key.
        rows: what the list is made from.
        row: makes one element.
        numbers_per_row: about how many numbers an element holds, which decides how many are written at a time.
    """
    step = max(1, _SLICE_NUMBERS // max(1, numbers_per_row))
    pieces = []
    for start in range(0, len(rows), step):
        if start:
            await asyncio.sleep(0)
        piece = json_bytes([row(start + place, value) for place, value in enumerate(rows[start : start + step])])
        pieces.append(piece[1:-1])
    return b"".join((json_bytes(head)[:-1], b',"', key.encode(), b'":[', b",".join(pieces), b"]}"))
