"""The database: SQLite in the data directory, or PostgreSQL by URL, spoken to in the same way."""

import asyncio
import platform
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from fundament.errors import FundamentError, UnavailableError, install
from fundament.telemetry import say_rarely

_BUSY_SECONDS = 10  # how long a writer of SQLite waits for another process's transaction
_MOST_SECONDS = 30.0  # of a transaction: a database that is held still keeps its connections, and says nothing
_FULL = ("disk is full", "No space left on device")  # SQLite's words, PostgreSQL's
_OTHER_SCHEMA = ("42703", "42P01")  # PostgreSQL's codes of a column and of a table that are not there
_ASYNC = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}
_SYNC = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}


def locate(store_url: str, data_dir: Path) -> URL:
    """Where the store is: what `store_url` says, or `fundament.db` in the data directory.

    Raises:
        FundamentError: a URL that is none, or of another database.
    """
    if not store_url:
        return URL.create("sqlite", database=str(data_dir / "fundament.db"))
    try:
        url = make_url(store_url)
    except (ArgumentError, ValueError) as error:  # the second of a port
        raise FundamentError("store_url is not a URL; write postgresql://USER:PASSWORD@HOST/DATABASE.") from error
    kind = url.get_backend_name()
    if kind == "postgres":
        kind = "postgresql"
    if kind not in _ASYNC:
        raise FundamentError(f"store_url names {kind}; write postgresql://… or sqlite:///FILE, or leave it out.")
    if kind == "sqlite" and url.database in (None, "", ":memory:"):
        raise FundamentError("store_url names no file: write sqlite:////absolute/path/fundament.db.")
    return url.set(drivername=kind)


def shown(url: URL) -> str:
    """Where the store is, for people to read: no password, and no other option, which may be one misspelt."""
    return url.difference_update_query([name for name in url.query if name not in _PLACES]).render_as_string()


def name_of(store_url: str, data_dir: Path, *, shared: bool) -> str:
    """What a depot calls the store: where it is, without who asks.

    Args:
        store_url: as the setting.
        data_dir: one in it goes wherever that does.
        shared: several machines have the depot, so what is on this one is told apart by its name.

    Raises:
        FundamentError: as `locate`.
    """
    url, here = locate(store_url, data_dir), f"{platform.node()}:" if shared else ""
    if is_sqlite(url):
        path = Path(str(url.database)).absolute()
        return here + str(path.relative_to(data_dir) if path.is_relative_to(data_dir) and not shared else path)
    told = [f" {name}={url.query[name]}" for name in _PLACES if name in url.query]
    local = here if url.host in (None, "localhost", "127.0.0.1", "::1") else ""
    return f"{local}postgresql://{url.host or ''}:{url.port or 5432}/{url.database or ''}{''.join(told)}"


def is_sqlite(url: URL) -> bool:
    """Whether the store is a file of our own."""
    return url.get_backend_name() == "sqlite"


class Database:
    """Transactions on the store.

    Args:
        url: of `locate`.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        with _driver_there():
            self._engine = create_async_engine(url.set(drivername=_ASYNC[url.drivername]), **_options(url))
        self._turn: asyncio.Lock | None = None
        if is_sqlite(url):
            _tame(self._engine.sync_engine)
            _wait_for_closing(self._engine.dialect)
            # Writers of this process take turns here; in SQLite they would poll for the lock.
            self._turn = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes nothing.

        Raises:
            UnavailableError: the database does not answer.
        """
        with _answering():
            async with asyncio.timeout(_MOST_SECONDS), self._engine.connect() as connection:
                yield await connection.execution_options(reads=True)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is kept at the end of the block, or undone where it raises.

        Raises:
            UnavailableError: the database does not answer, or another process holds it for too long.
        """
        with _answering():
            async with asyncio.timeout(_MOST_SECONDS), self._turn or nullcontext(), self._engine.begin() as connection:
                yield connection

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


@contextmanager
def connected(url: URL) -> Iterator[Connection]:
    """A transaction without an event loop: for migrations and the command line's start.

    Raises:
        FundamentError: the database cannot be reached, or its driver is not installed.
    """
    if is_sqlite(url):
        _make_room(Path(str(url.database)))
    with _driver_there():
        engine = create_engine(url.set(drivername=_SYNC[url.drivername]), **_options(url))
    if is_sqlite(url):
        _tame(engine)
        event.listen(engine, "first_connect", _write_ahead)
    try:
        with engine.begin() as connection:
            yield connection
    except (DatabaseError, InterfaceError) as error:
        # A file that is no database is the plain one of these; the others are statements at fault, which are ours,
        # but for an option of the URL that is none, which fails before any.
        if error.statement is not None and type(error) not in (DatabaseError, OperationalError, InterfaceError):
            raise
        raise FundamentError(f"The store {shown(url)} cannot be used: {_first_line(error)}") from error
    finally:
        engine.dispose()


class _Connection(sqlite3.Connection):
    """A connection that takes its transaction with it.

    SQLite keeps a closed connection's transaction, and every writer waiting, until the last unfinished statement is
    gone; where a task was cancelled amid one, that lives as long as the traceback.
    """

    def close(self) -> None:
        try:
            self.rollback()
        finally:
            super().close()

    def __del__(self) -> None:
        """Close what nobody has: where a task is cancelled while it connects, its connection is lost on the way.

        So Python, which from 3.13 on warns of those that nobody closed, has nothing to say.
        """
        with suppress(sqlite3.Error):  # it may be closed already
            self.close()


_PLACES = ("host", "port", "dbname", "service", "options")  # of a URL's query, what says where a database is

# A machine that is gone says nothing: without these its connections wait for hours. What the URL says goes before.
_VANISHED = {
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def _options(url: URL) -> dict[str, Any]:
    if is_sqlite(url):
        return {"hide_parameters": True, "connect_args": {"timeout": _BUSY_SECONDS, "factory": _Connection}}
    return {
        "hide_parameters": True,  # in errors, which are logged
        "pool_pre_ping": True,
        "pool_size": 8,
        "max_overflow": 8,
        "pool_timeout": _BUSY_SECONDS,
        "connect_args": {name: value for name, value in _VANISHED.items() if name not in url.query},
    }


def _tame(engine: Engine) -> None:
    """Make SQLite's transactions begin where we say."""

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        del record
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        # A commit survives the end of the process; the last ones before a loss of power may not.
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later could find that another one wrote in between, and fail.
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _wait_for_closing(dialect: Dialect) -> None:
    """Close a cancelled task's connection as any other.

    SQLAlchemy closes it in a task of its own, and where cancelled again stops its thread; that task never ends then.
    """

    def close(connection: DBAPIConnection) -> None:
        # Who is cancelled again waits no longer; the connection's thread closes it all the same.
        with suppress(asyncio.CancelledError):
            dialect.do_close(connection)

    dialect.has_terminate = False
    dialect.do_terminate = close  # type: ignore[method-assign, assignment]


def _write_ahead(connection: sqlite3.Connection, record: object) -> None:
    """Keep a write-ahead log, so that readers and a writer work side by side; the file remembers it."""
    del record
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Of two that change it at once, one is refused without waiting.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _make_room(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch(mode=0o600)  # it holds the keys' digests
    except OSError as error:
        why = f"{file.parent} is a file" if isinstance(error, FileExistsError) else error.strerror
        raise FundamentError(
            f"The store {file} cannot be made: {why}. Choose another directory with --data-dir, "
            "or a database with FUNDAMENT_STORE_URL."
        ) from error


@contextmanager
def _driver_there() -> Iterator[None]:
    try:
        yield
    except (ModuleNotFoundError, NoSuchModuleError) as error:
        raise FundamentError(f"PostgreSQL needs its driver: {install('postgres')}") from error


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError, TimeoutError) as error:
        if any(said in str(error) for said in _FULL):
            raise UnavailableError("The store's disk is full: it keeps nothing until there is room.") from error
        say_rarely("store failed", reason=_first_line(error))  # callers are not told
        if "readonly database" in str(error):
            raise UnavailableError("The store cannot be written; the server's log says why.") from error
        raise UnavailableError("The store does not answer. Try again shortly.") from error
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", None) not in _OTHER_SCHEMA:
            raise
        # An upgrade that this process has not followed yet: what is asked waits until it is restarted.
        say_rarely("store failed", reason=_first_line(error))
        raise UnavailableError("The store has another release's schema: restart this server.") from error


def _first_line(error: Exception) -> str:
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0] if said else type(error).__name__
