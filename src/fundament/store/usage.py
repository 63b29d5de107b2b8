"""The table `usage`: requests and tokens per key, day, model and endpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from sqlalchemy import BigInteger, Column, Date, String, Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.schema import insert_or, metadata

usage = Table(
    "usage",
    metadata,
    Column("key_id", String(12), primary_key=True),
    Column("day", Date, primary_key=True, index=True),
    Column("model", String(256), primary_key=True),
    Column("endpoint", String(64), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Line:
    """What is counted together. `key_id` is empty for callers without a key; `day` is in UTC."""

    key_id: str
    day: date
    model: str
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A line with its counts."""

    line: Line
    requests: int
    tokens: int


async def add(connection: AsyncConnection, uses: Mapping[Line, tuple[int, int]]) -> None:
    """Add requests and tokens to their lines."""
    if not uses:
        return
    insert = insert_or(connection, usage)
    statement = insert.on_conflict_do_update(
        index_elements=list(usage.primary_key),
        set_={
            "requests": usage.c.requests + insert.excluded.requests,
            "tokens": usage.c.tokens + insert.excluded.tokens,
        },
    )
    # In one order, so that two processes never wait for each other's rows.
    rows = sorted((line.key_id, line.day, line.model, line.endpoint, *counts) for line, counts in uses.items())
    await connection.execute(statement, [dict(zip(usage.c.keys(), row, strict=True)) for row in rows])


async def find(
    connection: AsyncConnection, *, key_id: str | None = None, since: date | None = None, until: date | None = None
) -> Sequence[Use]:
    """What was used from one day to another, both included, by one key or by everybody."""
    statement = select(usage).order_by(usage.c.day, usage.c.key_id, usage.c.model, usage.c.endpoint)
    if key_id is not None:
        statement = statement.where(usage.c.key_id == key_id)
    if since is not None:
        statement = statement.where(usage.c.day >= since)
    if until is not None:
        statement = statement.where(usage.c.day <= until)
    return [
        Use(line=Line(row.key_id, row.day, row.model, row.endpoint), requests=row.requests, tokens=row.tokens)
        for row in await connection.execute(statement)
    ]
