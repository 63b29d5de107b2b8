"""`fundament batch` against a started server."""

import asyncio
import json
import os
import subprocess
import sys
from decimal import Decimal
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fundament.client import ClientError, as_lines, base
from fundament.client import Server as Client
from tests.served import MODEL, Served, serving, wait_until
from tests.servers import free_port
from tests.website import website


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n\nthree\n")  # the mark some editors begin with is no text
    (tmp_path / "b.csv").write_text('id,text\nx,hello\ny,"a, b"\n')
    parquet.write_table(pyarrow.table({"id": [7, 8], "text": ["p", None]}), tmp_path / "c.parquet")
    return tmp_path


COMMAND = [sys.executable, "-m", "fundament", "batch"]


def batch(server: Served, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUNDAMENT_URL": server.url}
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, cwd=folder, capture_output=True, check=False, text=True
    )


def inline(server: Served, lines: list[object]) -> str:
    """The id of a new job whose lines are in its request."""
    answer = server.http.post("/v1/batch/embeddings", json={"model": MODEL, "input": lines})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["batch_id"])


def test_files_become_vectors(server: Served, folder: Path) -> None:
    files = ["a.txt", "b.csv", "c.parquet"]
    submitted = batch(server, folder, "submit", *files, "--embedding-type", "base64")
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout.split() == [(folder / f"{name}.job").read_text().strip() for name in files]
    waited = batch(server, folder, "wait", *files)
    assert waited.returncode == 0, waited.stderr
    assert "c.parquet: completed, 1 of 2 lines, 1 failed" in waited.stdout
    assert batch(server, folder, "fetch", *files).returncode == 0
    ids = [
        [json.loads(line)["custom_id"] for line in (folder / f"{name}.output.jsonl").read_text().splitlines()]
        for name in files
    ]
    assert ids == [["0", "1", "2"], ["x", "y"], ["7"]]
    [error] = (folder / "c.parquet.errors.jsonl").read_text().splitlines()
    assert json.loads(error)["custom_id"] == "8"
    cancelled = batch(server, folder, "cancel", "a.txt")
    assert (cancelled.returncode, "has ended already" in cancelled.stderr) == (1, True)


def test_the_errors_of_an_earlier_job_do_not_lie_beside_a_jobs_output(server: Served, tmp_path: Path) -> None:
    lines, errors = tmp_path / "x.jsonl", tmp_path / "x.jsonl.errors.jsonl"
    for line, found in (('{"input": 5}', True), ('"one"', False)):
        lines.write_text(f'"zero"\n{line}\n')
        for step in ("submit", "wait", "fetch"):
            assert batch(server, tmp_path, step, lines.name).returncode == 0
        assert errors.exists() == found


def test_jobs_that_were_made_over_http_are_told_too(server: Served, tmp_path: Path) -> None:
    job = inline(server, ["one", {"input": 5}])
    assert batch(server, tmp_path, "status", job).returncode == 0
    waited = batch(server, tmp_path, "wait", job)
    assert (waited.returncode, waited.stdout) == (0, f"{job}: completed, 1 of 2 lines, 1 failed\n")
    assert batch(server, tmp_path, "fetch", job).returncode == 0
    for kind in ("output", "errors"):
        assert len((tmp_path / f"{job}.{kind}.jsonl").read_text().splitlines()) == 1
    bulk = server.http.post("/v1/bulk-embeddings", files={"file": ("x.csv", b"text\na\n")}, data={"model": MODEL})
    refused = batch(server, tmp_path, "status", bulk.json()["id"])
    assert (refused.returncode, "not found or access denied" in refused.stderr) == (1, True)


def test_waiting_ends_where_a_job_expires(tmp_path: Path) -> None:
    with serving(tmp_path, threads=1, job_hours=0.0001) as server:
        job = inline(server, ["one"])
        waited = batch(server, tmp_path, "wait", job)
        assert waited.returncode in (0, 1), waited.stderr  # it may have completed before
        look = lambda: server.http.get(f"/v1/batch/{job}").json()["status"] == "expired"  # noqa: E731
        wait_until(look, "the job's time to be over")
        waited = batch(server, tmp_path, "wait", job)
        assert (waited.returncode, waited.stdout.split(",")[0]) == (1, f"{job}: expired")


def test_waiting_outlives_a_restart(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, threads=1, port=port, worker=False) as server:
        job = inline(server, ["one"])
        waiting = subprocess.Popen(
            [*COMMAND, "wait", job, "--url", server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        asked = lambda: any(event.get("path") == "/v1/batch/{batch_id}" for event in server.events())  # noqa: E731
        wait_until(asked, "the command to ask")
    with serving(tmp_path, threads=1, port=port):
        out, err = waiting.communicate()
    assert (waiting.returncode, out) == (0, f"{job}: completed, 1 of 1 line\n"), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "a.txt", "none.txt"), "none.txt cannot be read: no such file or directory."),
        (("status", "none.txt"), "There is no file none.txt, and no job has such an id."),
        (("submit", "a.bin"), "should end in .jsonl, .csv, .parquet or .txt"),
        (("submit", "a.txt", "--model", "no-such-model"), "not found"),
        (("status", "a.txt"), "has not been handed in"),
        (("status", "batch_none"), "not found or access denied"),
        (("status", "batch_none", "--url", "http://127.0.0.1:9"), "does not answer: connection refused. Name another"),
        (("status", "batch_none", "--url", "http://nobody.invalid"), "does not answer: its name cannot be looked up."),
        (("wait", "batch_none", "--url", "http://127.0.0.1:9"), "does not answer"),
        (("status", "batch_none", "--url", "http://127.0.0.1:x"), "is not a server's address"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(server: Served, folder: Path, arguments: list[str], said: str) -> None:
    ran = batch(server, folder, *arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_server_that_speaks_no_https_is_told(server: Served, folder: Path) -> None:
    ran = batch(server, folder, "status", "batch_none", "--url", server.url.replace("http:", "https:"))
    assert (ran.returncode, "is it http?" in ran.stderr) == (1, True)


def test_a_server_that_asks_for_a_key_says_where_it_goes(tmp_path: Path) -> None:
    with serving(tmp_path, threads=1, auth=True) as server:
        ran = batch(server, tmp_path, "status", "batch_none")
        assert (ran.returncode, "set FUNDAMENT_API_KEY, or --key" in ran.stderr) == (1, True)
        assert any(event["event"] == "no key works yet: fundament keys create NAME" for event in server.events())


def test_a_second_job_of_a_file_tells_of_the_first(server: Served, folder: Path) -> None:
    first = batch(server, folder, "submit", "a.txt").stdout.strip()
    again = batch(server, folder, "submit", "a.txt")
    assert f"a.txt was handed in before, as {first}; that job stays." in again.stderr
    assert (folder / "a.txt.job").read_text() == again.stdout != f"{first}\n"


def test_a_job_that_failed_leaves_no_output(server: Served, folder: Path) -> None:
    (folder / "x.jsonl").write_text("")
    assert batch(server, folder, "submit", "x.jsonl").returncode == 0
    assert batch(server, folder, "wait", "x.jsonl").returncode == 1
    fetched = batch(server, folder, "fetch", "x.jsonl")
    assert (fetched.returncode, "x.jsonl: failed, 0 lines: " in fetched.stdout) == (1, True)
    assert not (folder / "x.jsonl.output.jsonl").exists()


@pytest.mark.parametrize(
    ("key", "said"), [("any\r\n", "not found or access denied"), ("a\nb", "The key has characters that no key has")]
)
def test_a_key_may_end_with_a_line_and_holds_none(
    server: Served, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, said: str
) -> None:
    monkeypatch.setenv("FUNDAMENT_API_KEY", key)
    ran = batch(server, folder, "status", "batch_none")
    assert ran.returncode == 1
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_any_form_of_a_servers_address_does(server: Served, folder: Path, form: str) -> None:
    submitted = batch(server, folder, "submit", "a.txt", "--url", form.format(server.url))
    assert submitted.returncode == 0, submitted.stderr


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080/"),
        ("https://host/search/v1", "https://host/search/"),
        ("ftp://host", None),
        ("", None),
        ("http://", None),
    ],
)
def test_what_is_no_address_is_refused(given: str, found: str | None) -> None:
    if found is None:
        with pytest.raises(ClientError, match="is not a server's address"):
            base(given)
    else:
        assert base(given) == found


def test_a_text_file_is_read_without_the_mark_that_it_begins_with(folder: Path) -> None:
    lines = as_lines(folder / "a.txt", folder / "lines.jsonl")
    assert [json.loads(line) for line in lines.read_text().splitlines()] == ["one", "two", "three"]


@pytest.mark.parametrize("value", [b"bytes", Decimal(1)])
def test_a_column_of_what_is_no_text_is_refused(folder: Path, value: object) -> None:
    parquet.write_table(pyarrow.table({"text": [value]}), folder / "d.parquet")
    with pytest.raises(ClientError, match="a row holds something else than a text"):
        as_lines(folder / "d.parquet", folder / "lines.jsonl")


def test_a_file_that_is_damaged_is_told_from_a_disk_that_is_full(folder: Path) -> None:
    (folder / "d.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ClientError, match=r"d.parquet cannot be read: \w+.*"):
        as_lines(folder / "d.parquet", folder / "lines.jsonl")
    with pytest.raises(ClientError, match=r"/dev is full\. Name another directory with TMPDIR\."):
        as_lines(folder / "a.txt", Path("/dev/full"))


def test_a_job_whose_id_cannot_be_kept_is_told(server: Served, folder: Path) -> None:
    (folder / "a.txt.job").mkdir()
    submitted = batch(server, folder, "submit", "a.txt")
    assert (submitted.returncode, "Is a directory" in submitted.stderr) == (1, True)
    assert server.http.get(f"/v1/batch/{submitted.stdout.strip()}").is_success


@pytest.mark.parametrize("said", [b"[1]", b"{}", b"<html>"])
def test_another_server_is_told_apart(folder: Path, said: bytes) -> None:
    with website() as site:
        site.say("/v1/batch/batch_1", said, Content_Type="application/json")
        with pytest.raises(ClientError, match="does not answer as Fundament does"):
            asyncio.run(Client(site.url).status("batch_1"))


def test_a_fetch_that_is_left_leaves_nothing(folder: Path) -> None:
    async def leave(url: str) -> None:
        fetching = asyncio.ensure_future(Client(url).fetch("batch_1", "output", folder / "made.jsonl"))
        while not (folder / ".made.jsonl.part").exists():
            await asyncio.sleep(0.01)
        fetching.cancel()
        await asyncio.wait([fetching])

    with website() as site:

        def stall(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(b"half")
            handler.wfile.flush()
            site.ended.wait()

        site.serve("/v1/batch/batch_1/output", stall)
        asyncio.run(leave(site.url))
    assert not list(folder.glob("*made*")) + list(folder.glob(".made*"))


def test_a_job_that_is_refused_leaves_no_upload(server: Served, folder: Path) -> None:
    before = server.http.get("/v1/files").json()["data"]
    refused = batch(server, folder, "submit", "a.txt", "--model", "nope")
    assert refused.returncode == 1
    assert "nope" in refused.stderr
    assert server.http.get("/v1/files").json()["data"] == before
