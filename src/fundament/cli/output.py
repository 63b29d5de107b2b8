"""What commands print: tables, JSON, sizes, and what they refuse."""

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import orjson
import typer


def show(rows: list[dict[str, Any]], names: Sequence[str], *, as_json: bool, right: tuple[int, ...] = ()) -> None:
    """Rows as a table, or as JSON."""
    if as_json:
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    cells = [[str("" if row[name] is None else row[name]) for name in names] for row in rows]
    for line in aligned([[name.removesuffix("_at").upper() for name in names], *cells], right=right):
        typer.echo(line)


def aligned(rows: list[list[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Rows as lines whose columns begin, or at the given places end, below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size_of(n_bytes: int) -> str:
    """Bytes in words."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def end_output() -> None:
    """Write nothing more: what could not be written lies in a buffer, and would fail again as the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(reason: str) -> NoReturn:
    """Say why nothing is done, and end with exit code 1."""
    typer.secho(f"fundament: {reason}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)
