"""The table `files`: what callers uploaded; the bytes lie in the depot under the file's id."""

import secrets
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Column, Index, String, Table, func, or_, select
from sqlalchemy import Row as SqlRow
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.schema import Instant, known, metadata, page

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("key_id", String(12), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("n_bytes", BigInteger, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Index(None, "key_id", "created_at"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An uploaded file as the store knows it. `expires_at` is None where it stays until it is deleted."""

    id: str
    key_id: str
    name: str
    purpose: str
    n_bytes: int
    created_at: datetime
    expires_at: datetime | None


def new_id() -> str:
    """A file's id, which nobody can guess."""
    return f"file-{secrets.token_hex(12)}"


async def create(connection: AsyncConnection, file: File) -> None:
    """Note a file whose bytes are in their place."""
    await connection.execute(files.insert().values(asdict(file)))


async def get(connection: AsyncConnection, file_id: str, key_id: str, *, now: datetime) -> File | None:
    """One file of a key; None where its time is over."""
    there = or_(files.c.expires_at.is_(None), files.c.expires_at > now)
    row = await connection.execute(select(files).where(files.c.id == file_id, files.c.key_id == key_id, there))
    found = row.one_or_none()
    return None if found is None else _file(found)


async def recent(
    connection: AsyncConnection,
    key_id: str,
    *,
    limit: int,
    beyond: tuple[datetime, str] | None = None,
    oldest_first: bool = False,
) -> Sequence[File]:
    """A page of a key's files: those that come after a moment and an id, see `page`."""
    mine = select(files).where(files.c.key_id == key_id)
    statement = page(mine, files.c.created_at, files.c.id, limit=limit, beyond=beyond, oldest_first=oldest_first)
    return [_file(row) for row in await connection.execute(statement)]


async def everyone(connection: AsyncConnection) -> Sequence[File]:
    """Everybody's files, the oldest first."""
    return [_file(row) for row in await connection.execute(select(files).order_by(files.c.created_at, files.c.id))]


async def delete(connection: AsyncConnection, file_id: str, key_id: str | None) -> bool:
    """Forget a file of a key, or of whom it may be where that is None; False where there is none."""
    gone = files.delete().where(files.c.id == file_id).returning(files.c.id)
    if key_id is not None:
        gone = gone.where(files.c.key_id == key_id)
    return (await connection.execute(gone)).one_or_none() is not None


async def expire(connection: AsyncConnection, *, now: datetime) -> Sequence[str]:
    """Forget every file whose time is over; their ids, whose bytes are to be removed."""
    over = await connection.execute(files.delete().where(files.c.expires_at <= now).returning(files.c.id))
    return list(over.scalars())


async def kept(connection: AsyncConnection, ids: Collection[str]) -> set[str]:
    """Which of these are files."""
    return await known(connection, files.c.id, ids)


async def stored_bytes(connection: AsyncConnection, key_id: str) -> int:
    """Bytes of all files of a key."""
    total = select(func.coalesce(func.sum(files.c.n_bytes), 0)).where(files.c.key_id == key_id)
    return int((await connection.execute(total)).scalar_one())


def _file(row: SqlRow[Any]) -> File:
    return File(**row._mapping)
