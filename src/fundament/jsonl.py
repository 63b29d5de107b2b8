"""Files of lines, each a JSON value, and CSV files read as such."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from fundament.errors import FundamentError

MOST_LINE_BYTES = 32_000_000
TEXT_COLUMNS = ("text", "input", "content", "sentence", "document", "body")
csv.field_size_limit(MOST_LINE_BYTES)  # a cell is a text; the library's own limit is 128 KiB


class InputFileError(FundamentError):
    """An input that is no batch at all: the job fails with this sentence."""


def jsonl(lines: Iterable[Any]) -> Iterator[bytes]:
    """Lines as a file has them."""
    return (orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)


def csv_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A CSV file's rows as lines. Its first row names the columns: a text, and perhaps an id.

    Raises:
        InputFileError: not a CSV file in UTF-8, or no column can be told to be the text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _rows(csv.reader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputFileError(f"The input is not a CSV file in UTF-8: {error}.") from error


def _rows(rows: Iterator[list[str]]) -> Iterator[dict[str, Any]]:
    head = next((row for row in rows if row), [])
    names = [name.strip().lower() for name in head]
    place = next((names.index(name) for name in TEXT_COLUMNS if name in names), None)
    key = next((names.index(name) for name in ("custom_id", "id") if name in names), None)
    if not head:
        return
    if place is None:
        listed = ", ".join(f"'{name}'" for name in TEXT_COLUMNS)
        raise InputFileError(f"The CSV file's first row names no column of texts; call it one of {listed}.")
    for row in rows:
        if row:
            text = row[place] if place < len(row) else None
            named = {"custom_id": row[key]} if key is not None and key < len(row) else {}
            yield {**named, "input": text}
