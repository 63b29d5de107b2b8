"""Files of jobs and uploads, below a directory and in a bucket alike."""

import asyncio
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from fundament import buckets
from fundament.depot import Depot, depot_of, identity, of_job, of_upload, on_thread, probe, secret, whole
from fundament.errors import FundamentError, UnavailableError
from tests.servers import bucket_on, free_port
from tests.website import website

PART = 8 * 1024 * 1024
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def run(runner: asyncio.Runner) -> Run:
    return runner.run


@pytest.fixture
def bucket(s3_url: str) -> Iterator[str]:
    """The URL of an empty bucket."""
    with bucket_on(s3_url) as url:
        yield url


@pytest.fixture(params=["directory", "bucket"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Depot]:
    """What makes a depot anew in one place, as another process would."""
    url = "" if request.param == "directory" else f"{request.getfixturevalue('bucket')}/some/where"
    return lambda: depot_of(url, tmp_path)


@pytest.fixture
def depot(made: Callable[[], Depot]) -> Depot:
    return made()


async def pieces(*given: bytes, error: Exception | None = None) -> AsyncIterator[bytes]:
    for piece in given:
        yield piece
    if error is not None:
        raise error


def write(run: Run, depot: Depot, name: str, body: bytes = b"x") -> None:
    assert run(depot.write(name, pieces(body))) == len(body)


def read(run: Run, depot: Depot, name: str) -> bytes:
    found: bytes = run(whole(depot.read(name)))
    return found


@pytest.mark.parametrize("n_bytes", [0, 1, 1_000_000, PART, 3 * PART + 1])
def test_what_is_written_is_read(depot: Depot, run: Run, n_bytes: int) -> None:
    body = (bytes(range(256)) * (n_bytes // 256 + 1))[:n_bytes]
    cut = [body[at : at + 300_000] for at in range(0, n_bytes, 300_000)]
    assert run(depot.write(of_upload("file-1"), pieces(*cut))) == n_bytes
    assert read(run, depot, of_upload("file-1")) == body
    if n_bytes > 10:
        assert run(depot.read_part(of_upload("file-1"), start=3, n_bytes=7)) == body[3:10]

    async def lent() -> bytes:
        async with depot.lend(of_upload("file-1")) as path:
            return path.read_bytes()

    assert run(lent()) == body


@pytest.mark.parametrize("n_pieces", [0, 1, 40])
@pytest.mark.parametrize("error", [FundamentError("No."), OSError(28, "No space left on device"), ZeroDivisionError()])
def test_nothing_is_there_of_what_could_not_be_made(depot: Depot, run: Run, n_pieces: int, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run(depot.write(of_job("batch_1", "input"), pieces(*[bytes(1_000_000)] * n_pieces, error=error)))
    assert str(caught.value) == str(error)
    with pytest.raises(FileNotFoundError):
        read(run, depot, of_job("batch_1", "input"))


def test_parts_of_what_could_not_be_made_are_gone(bucket: str, s3_url: str, run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run(depot_of(bucket, Path()).write("a", pieces(*[bytes(1_000_000)] * 40, error=ZeroDivisionError())))
    listed = httpx.get(f"{s3_url}/{bucket.removeprefix('s3://')}?uploads")
    assert listed.is_success
    assert "<Upload>" not in listed.text


def test_a_name_is_written_once(depot: Depot, run: Run) -> None:
    write(run, depot, of_job("batch_1", "a"), b"first")
    with pytest.raises((FileExistsError, UnavailableError)):
        run(depot.write(of_job("batch_1", "a"), pieces(b"second")))
    assert read(run, depot, of_job("batch_1", "a")) == b"first"


def test_a_copy_stays_when_its_source_goes(depot: Depot, run: Run) -> None:
    write(run, depot, of_upload("file-1"), b"lines")
    run(depot.copy(of_upload("file-1"), of_job("batch_1", "input")))
    run(depot.remove(of_upload("file-1")))
    assert read(run, depot, of_job("batch_1", "input")) == b"lines"


def test_what_is_not_there(depot: Depot, run: Run) -> None:
    for work in (
        whole(depot.read(of_upload("file-1"))),
        depot.read_part(of_upload("file-1"), start=0, n_bytes=1),
        depot.copy(of_upload("file-1"), of_upload("file-2")),
    ):
        with pytest.raises(FileNotFoundError):
            run(work)
    run(depot.remove(of_upload("file-1")))
    assert run(depot.old("jobs", seconds=0)) == []


def test_a_job_is_removed_whole_and_alone(depot: Depot, run: Run) -> None:
    for name in (of_job("batch_1", "input"), of_job("batch_1", "0.output"), of_job("batch_10", "input")):
        write(run, depot, name)
    run(depot.remove(of_job("batch_1")))
    assert run(depot.old("jobs", seconds=-60)) == ["batch_10"]
    assert read(run, depot, of_job("batch_10", "input")) == b"x"


def test_what_is_old_is_found_by_its_id(depot: Depot, run: Run) -> None:
    for name in (of_job("batch_1", "input"), of_job("batch_1", "0.output"), of_job("batch_2", "input")):
        write(run, depot, name)
    write(run, depot, of_upload("file-1"))
    assert sorted(run(depot.old("jobs", seconds=-60))) == ["batch_1", "batch_2"]
    assert run(depot.old("files", seconds=-60)) == ["file-1"]
    assert run(depot.old("jobs", seconds=60)) == run(depot.old("files", seconds=60)) == []


def test_a_secret_is_the_same_for_all_who_come_together(made: Callable[[], Depot], run: Run) -> None:
    async def secrets() -> set[bytes]:
        return set(await asyncio.gather(*(secret(made(), "links") for _ in range(8))))

    [found] = run(secrets())
    assert len(found) == 32
    assert run(secret(made(), "links")) == found
    assert run(secret(made(), "webhook")) != found


def test_a_depot_has_one_name_for_all_who_share_it_and_another_elsewhere(
    made: Callable[[], Depot], run: Run, tmp_path: Path
) -> None:
    name = run(identity(made()))
    assert run(identity(made())) == name
    assert run(identity(depot_of("", tmp_path / "elsewhere"))) != name


def test_a_secret_is_its_users_alone(tmp_path: Path, run: Run) -> None:
    run(secret(depot_of("", tmp_path), "links"))
    assert (tmp_path / "links.secret").stat().st_mode & 0o777 == 0o600


def test_a_depot_that_works_is_left_as_it_was(depot: Depot, run: Run) -> None:
    run(probe(depot))


def test_pieces_are_made_on_another_thread(run: Run) -> None:
    threads = set[int]()

    def make() -> Iterator[bytes]:
        for _ in range(5):
            threads.add(threading.get_ident())
            yield bytes(100_000)

    assert run(whole(on_thread(make()))) == bytes(500_000)
    assert threading.get_ident() not in threads


def test_a_bucket_without_its_client_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    depot_of("", tmp_path)
    with pytest.raises(FundamentError, match=r"pip install 'fundament\[cloud\]'"):
        depot_of("s3://files", tmp_path)


def test_an_environment_that_cannot_be_used_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(FundamentError, match=r"gs://files cannot be used: .*none\.json"):
        depot_of("gs://files", tmp_path)


@pytest.fixture(params=["nobody listens", "nobody speaks", "no entry"])
def deaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Depot]:
    """A depot in a bucket that does not answer as it should, with a client that soon gives up."""
    monkeypatch.setitem(buckets._CLIENT, "read_timeout", timedelta(milliseconds=200))  # type: ignore[misc]
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)  # type: ignore[misc]
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    with website() as site, socket.create_server(("127.0.0.1", 0)) as silent:
        for path in ("", "/files/a", "/files/b", "/links.secret"):
            site.say(f"/bucket{path}", status=403)
        here = {
            "nobody listens": f"http://127.0.0.1:{free_port()}",
            "nobody speaks": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "no entry": site.url,
        }
        monkeypatch.setenv("AWS_ENDPOINT_URL", here[request.param])
        yield depot_of("s3://bucket", tmp_path)


def test_a_bucket_that_does_not_answer(deaf: Depot, run: Run) -> None:
    for work in (
        deaf.write("files/a", pieces(b"x")),
        deaf.write("files/b", pieces(bytes(PART), b"x")),
        deaf.copy("files/a", "files/b"),
        whole(deaf.read("files/a")),
        deaf.read_part("files/a", start=0, n_bytes=1),
        deaf.old("files", seconds=0),
        secret(deaf, "links"),
    ):
        with pytest.raises(UnavailableError, match="cannot be reached now") as caught:
            run(work)
        assert caught.value.retry_after_seconds
    run(deaf.remove("files/a"))  # is left to the sweep


def test_a_bucket_that_is_not_there(bucket: str, run: Run, tmp_path: Path) -> None:
    depot = depot_of(f"{bucket}-not", tmp_path)
    for work in (
        depot.write("files/a", pieces(b"x")),
        depot.write("files/a", pieces(bytes(PART), b"x")),
        depot.old("files", seconds=0),
        secret(depot, "links"),
    ):
        with pytest.raises(UnavailableError):
            run(work)
