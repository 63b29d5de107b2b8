"""Transactions end with their block, however it ends; a database that says nothing is given up."""

import asyncio
import gc
import logging
import os
import platform
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.errors import FundamentError, UnavailableError
from fundament.store import database
from fundament.store.database import Database, connected, locate, name_of
from tests.servers import database_on

# Its first row takes a while and more follow, so who is cancelled meanwhile leaves an unfinished statement behind.
_SLOW = text(
    "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
    "SELECT i FROM n WHERE i > 2999000"
)


@pytest.mark.parametrize("n_cancels", [1, 2, 3])
def test_a_cancelled_transaction_is_undone_at_once(
    store_url: str, store: Database, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture, n_cancels: int
) -> None:
    async def write() -> None:
        async with store.write() as connection:
            await connection.execute(text("CREATE TABLE half (done INTEGER)"))
            await connection.execute(_SLOW)

    async def write_and_leave() -> asyncio.Task[None]:
        writing = asyncio.ensure_future(write())
        await asyncio.sleep(0.1)
        for _ in range(n_cancels):
            writing.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait([writing])
        return writing

    left = runner.run(write_and_leave())
    assert left.cancelled()
    # Nothing is wrong; psycopg warns where the second one comes before the database has ended the statement.
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    # The task keeps what was raised, and that the frames with the statement: nobody may have to wait for their end.
    with connected(locate(store_url, Path())) as connection:
        assert not inspect(connection).has_table("half")


def test_a_writer_waits_no_longer_for_its_turn_than_for_its_transaction(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        store = Database(locate("", tmp_path))
        assert store._turn is not None
        async with store._turn:
            with monkeypatch.context() as patch, pytest.raises(UnavailableError):
                patch.setattr(database, "_MOST_SECONDS", 0.1)
                await asyncio.wait_for(_nothing(store), 30)
        await _nothing(store)
        await store.close()

    async def _nothing(store: Database) -> None:
        async with store.write():
            pass

    runner.run(work())


def test_who_is_cancelled_while_it_connects_leaves_no_connection(
    tmp_path: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[int] = set()
    closed: set[int] = set()

    class Counted(database._Connection):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.number = len(opened)
            opened.add(self.number)

        def close(self) -> None:
            super().close()
            closed.add(self.number)

    monkeypatch.setattr(database, "_Connection", Counted)

    async def read(store: Database) -> None:
        async with store.read() as connection:
            await connection.execute(text("SELECT 1"))

    async def cancel(n_steps: int) -> None:
        store = Database(locate("", tmp_path))
        reading = [asyncio.ensure_future(read(store)) for _ in range(4)]
        for _ in range(n_steps):
            await asyncio.sleep(0)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)
        await store.close()

    for n_steps in range(60):
        runner.run(cancel(n_steps))
    gc.collect()
    assert opened
    assert closed == opened
    threads = [thread for thread in threading.enumerate() if "connection" in thread.name]
    for thread in threads:
        thread.join(timeout=10)  # one whose connection is closed may be on its way out
    assert not [thread for thread in threads if thread.is_alive()]


def test_what_a_store_says_is_in_the_log_once(
    tmp_path: Path, runner: asyncio.Runner, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundament.telemetry._said", {})

    async def scenario() -> None:
        store = Database(locate("", tmp_path))
        for _ in range(3):
            with pytest.raises(UnavailableError, match="cannot be written; the server's log says why"):
                async with store.write() as connection:
                    await connection.exec_driver_sql("PRAGMA query_only = ON")
                    await connection.exec_driver_sql("CREATE TABLE one (number INTEGER)")
        await store.close()

    runner.run(scenario())
    [said] = [record.fields["reason"] for record in caplog.records if record.getMessage() == "store failed"]
    assert said == "attempt to write a readonly database"


def test_a_postgresql_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setitem(database._VANISHED, "connect_timeout", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and nobody answers
        url = locate(f"postgresql://127.0.0.1:{silent.getsockname()[1]}/x", Path("/"))
        with pytest.raises(FundamentError, match="cannot be used"), connected(url):
            pass


def test_errors_tell_no_values(tmp_path: Path, runner: asyncio.Runner) -> None:
    """They are logged."""

    async def scenario() -> None:
        store = Database(locate("", tmp_path))
        async with store.read() as connection:
            with pytest.raises(OperationalError, match="nowhere") as refused:
                await connection.execute(text("SELECT * FROM nowhere WHERE a = :a"), {"a": "hunter2"})
        assert "hunter2" not in str(refused.value)
        await store.close()

    runner.run(scenario())


def test_an_option_that_is_none_is_named_and_its_value_is_not() -> None:
    pytest.importorskip("psycopg")
    url = locate("postgresql://127.0.0.1/x?host=/run/db&passwrd=hunter2", Path("/"))
    with pytest.raises(FundamentError) as refused, connected(url):
        pass
    where = "postgresql://127.0.0.1/x?host=%2Frun%2Fdb"
    assert refused.value.detail == f'The store {where} cannot be used: invalid connection option "passwrd"'


@pytest.mark.parametrize("begin", [Database.read, Database.write])
def test_a_postgresql_that_is_held_still_is_given_up(
    begin: Callable[[Database], AbstractAsyncContextManager[AsyncConnection]],
    postgres_url: str,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = 0

    async def ask() -> None:
        nonlocal held
        async with begin(store) as connection:
            held = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
            os.kill(held, signal.SIGSTOP)
            await connection.execute(text("SELECT 1"))

    store = Database(locate(postgres_url, Path()))
    monkeypatch.setattr(database, "_MOST_SECONDS", 1.0)
    try:
        with pytest.raises(UnavailableError, match="does not answer"):
            runner.run(ask())
    finally:
        os.kill(held, signal.SIGCONT)
    runner.run(store.close())


def test_a_schema_that_a_newer_release_has_changed_is_waited_out(
    postgres_url: str, postgres_template: str, runner: asyncio.Runner
) -> None:
    async def scenario(store: Database) -> None:
        for statement, asked in (
            ("ALTER TABLE keys RENAME COLUMN tier TO level", "SELECT tier FROM keys"),
            ("ALTER TABLE keys RENAME TO callers", "SELECT id FROM keys"),
        ):
            async with store.write() as connection:
                await connection.execute(text(statement))
            with pytest.raises(UnavailableError, match="another release's schema"):
                async with store.read() as connection:
                    await connection.execute(text(asked))
        with pytest.raises(ProgrammingError):  # a mistake of ours is one
            async with store.read() as connection:
                await connection.execute(text("SELEC"))
        await store.close()

    with database_on(postgres_url, like=postgres_template) as url:
        runner.run(scenario(Database(locate(url, Path()))))


def test_what_the_url_says_of_timeouts_goes_before() -> None:
    url = locate("postgresql://host/x?connect_timeout=3", Path("/"))
    assert "connect_timeout" not in database._options(url)["connect_args"]
    assert database._options(url)["connect_args"]["tcp_user_timeout"]


def test_a_stores_name_tells_no_password(tmp_path: Path) -> None:
    def name(url: str, *, shared: bool = False) -> str:
        return name_of(url, tmp_path, shared=shared)

    assert name("postgresql://me:secret@host/x?connect_timeout=1") == "postgresql://host:5432/x"
    assert name("postgresql:///x?host=/sockets/a&options=-csearch_path%3Ds") == (
        "postgresql://:5432/x host=/sockets/a options=-csearch_path=s"
    )
    assert name("") == "fundament.db"
    assert name("sqlite:////elsewhere/a.db") == "/elsewhere/a.db"


def test_a_store_on_this_machine_is_no_other_machines(tmp_path: Path) -> None:
    for url in ("", "sqlite:////elsewhere/a.db", "postgresql://localhost/x"):
        assert name_of(url, tmp_path, shared=True).startswith(f"{platform.node()}:")
    assert name_of("postgresql://host/x", tmp_path, shared=True) == "postgresql://host:5432/x"
    assert name_of("", tmp_path, shared=True) != name_of("", tmp_path / "other", shared=True)
