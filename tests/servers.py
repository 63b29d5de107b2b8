"""Real database servers, started from the system's own binaries, or given by URL in the environment.

`TEST_POSTGRES_URL` names a PostgreSQL whose user may create databases, `TEST_REDIS_URL` a Redis that may be emptied.
`TEST_SERVERS=required` makes a test fail, in place of being skipped, where a server is neither given nor installed.
"""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection, socket
from typing import Any, NoReturn
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from tests.served import wait_until


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL that is up."""
    if url := os.environ.get("TEST_POSTGRES_URL"):
        yield url
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    program = str(found[-1]) if found else shutil.which("postgres")
    if program is None:
        _missing("PostgreSQL", "postgresql", "TEST_POSTGRES_URL")
    port = free_port()
    with _scratch() as (folder, account):
        initdb = [str(Path(program).resolve().with_name("initdb")), "--auth=trust", "--username=test", "--no-sync"]
        made = subprocess.run(
            [*initdb, "--encoding=UTF8", "--locale=C", f"--pgdata={folder / 'data'}"],
            capture_output=True,
            check=False,
            text=True,
            **account,
        )
        assert made.returncode == 0, made.stderr
        options = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 200,
            # Nothing here outlives the tests, so nothing waits for a disk.
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
        }
        command = [program, "-D", str(folder / "data"), *(f"--{name}={value}" for name, value in options.items())]
        with _process(command, folder / "log", signal.SIGINT, account) as is_up:
            url = f"postgresql://test@127.0.0.1:{port}/postgres"
            wait_until(lambda: is_up() and _answers(url), "PostgreSQL")
            yield url


@contextmanager
def redis() -> Iterator[str]:
    """The URL of an empty Redis that is up."""
    if url := os.environ.get("TEST_REDIS_URL"):
        yield url
        return
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        _missing("Redis", "redis-server", "TEST_REDIS_URL")
    port = free_port()
    with _scratch() as (folder, account):
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        with _process([program, *options], folder / "log", signal.SIGTERM, account) as is_up:
            wait_until(lambda: is_up() and _listens(port), "Redis")
            yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def s3() -> Iterator[str]:
    """The URL of an S3 server that is up and empty; it takes any credentials."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fundament-") as folder:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        with _process(command, Path(folder) / "log", signal.SIGTERM, {"cwd": folder}) as is_up:
            wait_until(lambda: is_up() and _listens(port), "S3")
            yield url


@contextmanager
def bucket_on(server_url: str, *, through: str | None = None) -> Iterator[str]:
    """The URL of a new bucket on an S3 server, to which the environment leads while the block lasts.

    Args:
        server_url: of `s3`.
        through: a way to that server, in place of its own URL.
    """
    name = f"test-{uuid4().hex}"
    made = httpx.put(f"{server_url}/{name}")
    assert made.is_success, made.text
    given = {"ENDPOINT_URL": through or server_url, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in given.items():
            patch.setenv(f"AWS_{variable}", value)
        yield f"s3://{name}"


@contextmanager
def database_on(server_url: str, *, like: str | None = None) -> Iterator[str]:
    """The URL of a new database on a PostgreSQL server; it is gone afterwards.

    Args:
        server_url: of `postgres`.
        like: the name of a database to copy.
    """
    url = make_url(server_url).set(drivername="postgresql+psycopg")
    name = f"test_{uuid4().hex}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {like or 'template0'}"))
        yield url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        engine.dispose()


def _missing(name: str, package: str, variable: str) -> NoReturn:
    reason = f"{name} is not installed: apt-get install {package}, or name one with {variable}"
    if os.environ.get("TEST_SERVERS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def _scratch() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder, and the options that run a program as its owner: PostgreSQL refuses to run as root."""
    with tempfile.TemporaryDirectory(prefix="fundament-") as name:
        account: dict[str, Any] = {"cwd": name}
        if os.geteuid() == 0:
            owner = pwd.getpwnam("nobody")
            os.chown(name, owner.pw_uid, owner.pw_gid)
            account |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        yield Path(name), account


@contextmanager
def _process(
    command: Sequence[str], log_file: Path, end: signal.Signals, account: dict[str, Any]
) -> Iterator[Callable[[], bool]]:
    """Run a server; what is yielded says that it runs, or fails with its log."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **account)

    def is_up() -> bool:
        assert process.poll() is None, log_file.read_text()
        return True

    try:
        yield is_up
    finally:
        process.send_signal(end)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    try:
        engine.connect().close()
    except Exception:
        return False
    finally:
        engine.dispose()
    return True


def _listens(port: int) -> bool:
    try:
        create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
