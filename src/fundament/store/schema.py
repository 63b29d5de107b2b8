"""What all tables share: their metadata and the types that both databases store alike."""

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    Integer,
    MetaData,
    Select,
    Text,
    literal,
    select,
    text,
    tuple_,
)
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.schema import Table
from sqlalchemy.types import TypeDecorator

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

_MOST_IDS = 10_000

# SQLite numbers rows by themselves only where the column's type is INTEGER, which holds 64 bits there.
Whole = BigInteger().with_variant(Integer, "sqlite")


class Instant(TypeDecorator[datetime]):
    """A moment in UTC. SQLite keeps no time zone, so it is taken off on the way in and put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """A moment as the database keeps it."""
        if value is None:
            return None
        assert value.tzinfo is not None, "a moment without a time zone"
        return value.astimezone(UTC) if dialect.name != "sqlite" else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """A moment as Python keeps it."""
        del dialect
        return value and (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


class Words(TypeDecorator[str]):
    """A sentence for people, which may quote anything; characters that a database does not keep are left out."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """A sentence as the database keeps it."""
        del dialect
        return value and value.replace("\0", "").encode(errors="replace").decode()


Row = TypeVar("Row", bound=tuple[Any, ...])


def page(
    statement: Select[Row],
    moment: Column[datetime] | Column[datetime | None],
    id_: ColumnElement[str],
    *,
    limit: int,
    beyond: tuple[datetime, str] | None = None,
    oldest_first: bool = False,
) -> Select[Row]:
    """A statement's rows by a moment and, of one moment, by their id, the newest first; those beyond a place."""
    place = tuple_(moment, id_)
    if beyond is not None:
        border = tuple_(literal(beyond[0], Instant), literal(beyond[1]))
        statement = statement.where(place > border if oldest_first else place < border)
    columns = (moment.asc(), id_.asc()) if oldest_first else (moment.desc(), id_.desc())
    return statement.order_by(*columns).limit(limit)


def slices(ids: Collection[str]) -> Iterator[list[str]]:
    """Ids in parts that a statement can name: PostgreSQL takes 65,535 parameters."""
    listed = list(ids)
    for start in range(0, len(listed), _MOST_IDS):
        yield listed[start : start + _MOST_IDS]


async def known(
    connection: AsyncConnection, column: Column[str], ids: Collection[str], *conditions: ColumnElement[bool]
) -> set[str]:
    """Which of these ids, however many, a column has in rows that meet the conditions."""
    found = set[str]()
    for some in slices(ids):
        found |= {*(await connection.execute(select(column).where(column.in_(some), *conditions))).scalars()}
    return found


async def take_turns(connection: AsyncConnection, name: str) -> None:
    """Make transactions of one name follow each other, so that what one counts is still so when it writes."""
    if connection.dialect.name == "postgresql":  # in SQLite a transaction that writes is alone
        await connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})


def insert_or(connection: AsyncConnection, table: Table) -> Any:
    """An INSERT that knows `on_conflict_do_update` and `on_conflict_do_nothing` of the connection's database."""
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table)


def whole_metadata() -> MetaData:
    """The metadata with every table of this package."""
    import fundament.store

    for module in iter_modules(fundament.store.__path__):
        import_module(f"fundament.store.{module.name}")
    return metadata
