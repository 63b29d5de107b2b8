"""Whose jobs are, how many there may be, what they cost, and how they end."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.api.jobs.batches import OpenAIBatch
from fundament.config import Tier
from fundament.depot.directory import Directory
from fundament.errors import UnavailableError
from fundament.store import leases
from fundament.store.jobs import chunks, jobs
from fundament.worker import chunks as worker_chunks
from fundament.worker import housekeeping, webhooks
from tests.accounts.keys import bearer, id_of, make_key, read_key
from tests.contract.schemas import conforms
from tests.inprocess import Api, running, work_until
from tests.served import MODEL, PATIENCE_SECONDS
from tests.website import website


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Api]:
    """An application that asks for keys; its worker runs where a test says so."""
    with running(
        folder,
        auth=True,
        worker=False,
        max_jobs_per_key=4,
        max_stored_mb_per_key=0.01,
        allowed_networks=["127.0.0.1/32"],
        tiers={"slow": {"tokens_per_minute": 5}},
    ) as api:
        yield api


def new_key(api: Api, folder: Path, **fields: Any) -> str:
    """A new key. The application runs on meanwhile: while it stands still it may be in the midst of a transaction."""
    return api.run(asyncio.to_thread(lambda: make_key(folder, **fields)))


def balance_of(api: Api, key: str, folder: Path) -> int | None:
    return api.run(asyncio.to_thread(read_key, key, folder)).balance


def ask(api: Api, key: str, method: str, path: str, **options: Any) -> httpx.Response:
    headers = bearer(key) if key else {}
    return api.run(api.client.request(method, path, headers=headers, **options))


def submit(api: Api, key: str, lines: list[object]) -> str:
    answer = ask(api, key, "POST", "/v1/batch/embeddings", json={"model": MODEL, "input": lines})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["batch_id"])


def status(api: Api, key: str, job: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(api, key, "GET", f"/v1/batch/{job}").json()
    return found


def work(api: Api, key: str, job: str) -> dict[str, Any]:
    """Run a worker until a job has ended."""

    async def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = (await api.client.get(f"/v1/batch/{job}", headers=bearer(key))).json()
        return None if found["status"] in ("pending", "processing") else found

    found: dict[str, Any] = work_until(api, ended)
    return found


def test_a_job_is_its_keys_alone(api: Api, folder: Path) -> None:
    mine, other = new_key(api, folder), new_key(api, folder)
    job = submit(api, mine, ["one"])
    found = work(api, mine, job)
    assert found["status"] == "completed"
    paths = [("GET", f"/v1/batch/{job}{rest}") for rest in ("", "/output", "/errors")]
    for method, path in [*paths, ("DELETE", f"/v1/batch/{job}")]:
        assert ask(api, other, method, path).status_code == 404
        assert ask(api, "", method, path).status_code == 401
    assert ask(api, other, "GET", "/v1/batches").json() == []
    assert [each["batch_id"] for each in ask(api, mine, "GET", "/v1/batches").json()] == [job]
    assert ask(api, "", "GET", found["output_url"]).status_code == 200  # a link is a key of its own
    assert ask(api, "", "GET", f"/v1/batch/{job}/output?signature=0").status_code == 404


def test_a_line_that_cannot_be_kept_is_named(api: Api, folder: Path) -> None:
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    body = {"model": MODEL, "input": ["one", {"input": "two", "more": deep}]}
    answer = ask(api, new_key(api, folder), "POST", "/v1/batch/embeddings", json=body)
    conforms(answer)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "body -> input -> 1"


def test_a_file_is_its_keys_alone(api: Api, folder: Path) -> None:
    mine, other = new_key(api, folder), new_key(api, folder)
    sent = ask(api, mine, "POST", "/v1/files", files={"file": ("x.jsonl", b'"one"')})
    file = sent.json()["id"]
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert ask(api, other, method, f"/v1/files/{file}{path}").status_code == 404
    body = {"model": MODEL, "input_file_id": file}
    assert ask(api, other, "POST", "/v1/batch/embeddings", json=body).status_code == 404
    assert ask(api, mine, "POST", "/v1/batch/embeddings", json=body).status_code == 202


def test_a_file_that_a_job_did_not_make_is_named_as_it_was_asked_for(api: Api, folder: Path) -> None:
    for path in ("/file-abc-output", "/file-abc-errors/content", "?after=file-abc-output"):
        answer = ask(api, new_key(api, folder), "GET", f"/v1/files{path}")
        assert answer.status_code == 404
        assert answer.json()["detail"].startswith("File 'file-abc-")


def test_a_result_on_another_machine_has_no_link(api: Api, folder: Path) -> None:
    key, file = new_key(api, folder), {"file": ("x.jsonl", b'"one"')}
    made = ask(api, key, "POST", "/v1/bulk-embeddings", files=file, data={"model": MODEL}).json()
    path = f"/v1/bulk-embeddings/{made['id']}"

    async def ended() -> bool:
        return bool((await api.client.get(path, headers=bearer(key))).json()["status"] == "completed")

    async def move() -> None:
        async with api.app.state.parts.store.write() as connection:
            await connection.execute(update(jobs).values(depot="elsewhere").where(jobs.c.dialect == "bulk"))

    work_until(api, ended)
    assert ask(api, key, "POST", f"{path}/download-result").is_success
    api.run(move())
    answer = ask(api, key, "POST", f"{path}/download-result")
    assert (answer.status_code, "on another machine" in answer.json()["detail"]) == (404, True)


def test_jobs_that_wait_are_counted_by_key(api: Api, folder: Path) -> None:
    mine, other = new_key(api, folder), new_key(api, folder)
    first = submit(api, mine, ["one"])
    for _ in range(3):
        submit(api, mine, ["two"])
    refused = ask(api, mine, "POST", "/v1/batch/embeddings", json={"model": MODEL, "input": ["three"]})
    assert (refused.status_code, refused.json()["code"]) == (429, "RATE_CONCURRENCY_LIMIT_EXCEEDED")
    assert "cancel one" in refused.json()["detail"]
    assert int(refused.headers["retry-after"]) > 0
    submit(api, other, ["one"])
    assert ask(api, mine, "DELETE", f"/v1/batch/{first}").json()["status"] == "cancelled"
    submit(api, mine, ["three"])


def test_bytes_that_lie_here_are_counted_by_key(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    sent = ask(api, key, "POST", "/v1/files", files={"file": ("x.jsonl", bytes(6000))})
    assert sent.status_code == 200
    more = {"model": MODEL, "input": ["x" * 6000]}
    for refused in (
        ask(api, key, "POST", "/v1/batch/embeddings", json=more),
        ask(api, key, "POST", "/v1/files", files={"file": ("x.jsonl", bytes(6000))}),
    ):
        assert refused.status_code == 413
        assert "Delete files" in refused.json()["detail"]
    before = {path.name for path in (folder / "jobs").iterdir()}
    ask(api, key, "POST", "/v1/batch/embeddings", json=more)
    assert {path.name for path in (folder / "jobs").iterdir()} == before  # nothing stays of what was refused
    assert ask(api, key, "DELETE", f"/v1/files/{sent.json()['id']}").status_code == 200
    assert ask(api, key, "POST", "/v1/batch/embeddings", json=more).status_code == 200


def test_lines_are_paid_as_they_are_embedded(api: Api, folder: Path) -> None:
    key = new_key(api, folder, balance=1000)
    found = work(api, key, submit(api, key, ["one", "two words", {"input": 5}]))
    spent = found["stats"]["total_tokens"]
    assert spent == 3 + 4
    assert balance_of(api, key, folder) == 1000 - spent
    [line] = ask(api, key, "GET", "/v1/me").json()["usage"]
    assert (line["endpoint"], line["requests"], line["tokens"]) == ("/v1/batch/embeddings", 2, spent)


def test_a_job_stops_where_its_balance_ends_and_keeps_its_output(api: Api, folder: Path) -> None:
    key = new_key(api, folder, balance=1500)  # a line costs 3
    found = work(api, key, submit(api, key, ["x"] * 600))
    assert found["status"] == "failed"
    assert "Insufficient account balance" in found["error"]
    assert found["stats"]["completed"] == 500
    assert balance_of(api, key, folder) == 0
    output = ask(api, "", "GET", found["output_url"])
    assert [json.loads(line)["custom_id"] for line in output.text.splitlines()] == [str(n) for n in range(500)]


def test_jobs_of_one_balance_spend_it_once(api: Api, folder: Path) -> None:
    key = new_key(api, folder, balance=1500)
    both = [submit(api, key, ["x"] * 400) for _ in range(2)]
    found = [work(api, key, job) for job in both]
    counts = [each["stats"]["completed"] for each in found]
    assert (sum(counts), balance_of(api, key, folder)) == (500, 0)
    assert "failed" in [each["status"] for each in found]
    for each, count in zip(found, counts, strict=True):
        rows = ask(api, key, "GET", f"/v1/batch/{each['batch_id']}/output").text.splitlines()
        assert [json.loads(line)["custom_id"] for line in rows] == [str(n) for n in range(count)]


def test_a_job_of_a_key_with_nothing_left_is_not_embedded(api: Api, folder: Path) -> None:
    key = new_key(api, folder, balance=0)
    found = work(api, key, submit(api, key, ["x"]))
    assert (found["status"], found["stats"]["completed"]) == ("failed", 0)
    assert "keys credit" in found["error"]


def test_a_job_that_waits_for_its_minute_keeps_nobody_waiting(api: Api, folder: Path) -> None:
    slow, other = new_key(api, folder, tier="slow"), new_key(api, folder)
    waiting = submit(api, slow, ["x"] * 1500)  # more chunks than a worker holds, each of more than a minute's tokens
    found = work(api, other, submit(api, other, ["y"] * 600))
    assert (found["status"], found["stats"]["completed"]) == ("completed", 600)
    left = status(api, slow, waiting)
    assert (left["status"], left["stats"]["completed"]) == ("processing", 0)
    ask(api, slow, "DELETE", f"/v1/batch/{waiting}")


def test_a_tier_that_is_gone_allows_a_job_what_the_least_does(api: Api, folder: Path) -> None:
    key = new_key(api, folder, tier="gone")
    limits = api.app.state.parts.accounts.limits
    assert not api.run(limits.spend(id_of(key), Tier(tokens_per_minute=1_000_000), 999_999)).refused
    job = submit(api, key, ["x"])

    async def put_off() -> bool:
        async with api.app.state.parts.store.read() as connection:
            [row] = await connection.execute(jobs.select().where(jobs.c.id == job))
        return row.not_before is not None

    work_until(api, put_off)
    assert status(api, key, job)["stats"]["completed"] == 0
    ask(api, key, "DELETE", f"/v1/batch/{job}")


def test_inputs_that_are_slow_to_fetch_keep_nobody_waiting(api: Api, folder: Path) -> None:
    slow, other, third = new_key(api, folder), new_key(api, folder), new_key(api, folder)
    with website() as site:
        fast = site.say("/fast", b'"x"\n')
        stuck = site.serve("/slow", lambda _: site.ended.wait() and None)
        hung = [
            ask(api, slow, "POST", "/v1/batch/embeddings", json={"model": MODEL, "input_url": stuck}) for _ in range(4)
        ]
        asked = ask(api, third, "POST", "/v1/batch/embeddings", json={"model": MODEL, "input_url": fast})
        inline = submit(api, other, ["x"])
        assert work(api, other, inline)["status"] == "completed"
        assert work(api, third, asked.json()["batch_id"])["status"] == "completed"
        for each in hung:
            job = each.json()["batch_id"]
            assert status(api, slow, job)["status"] == "pending"
            ask(api, slow, "DELETE", f"/v1/batch/{job}")


def test_a_job_ends_with_its_key(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    job = submit(api, key, ["one"])

    async def move() -> None:
        async with api.app.state.parts.store.write() as connection:
            gone = update(jobs).where(jobs.c.id == job)
            await connection.execute(gone.values(key_id="nobody"))

    api.run(move())

    async def look() -> dict[str, Any] | None:
        async with api.app.state.parts.store.read() as connection:
            [row] = await connection.execute(jobs.select().where(jobs.c.id == job))
        return dict(row._mapping) if row.ended_at is not None else None

    ended = work_until(api, look)
    assert (ended["state"], ended["n_completed"]) == ("failed", 0)
    assert "revoked" in ended["error"]


def test_a_job_expires_with_its_files_and_links(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    job = submit(api, key, ["one"])
    found = work(api, key, job)
    assert (folder / "jobs" / job).exists()

    async def age() -> None:
        async with api.app.state.parts.store.write() as connection:
            over = datetime.now(UTC) - timedelta(seconds=1)
            await connection.execute(update(jobs).where(jobs.c.id == job).values(expires_at=over))

    api.run(age())
    other = submit(api, key, ["two"])
    work(api, key, other)
    expired = status(api, key, job)
    assert (expired["status"], expired["output_url"]) == ("expired", None)
    assert expired["stats"]["completed"] == 1
    for path in (f"/v1/batch/{job}/output", found["output_url"]):
        answer = ask(api, key, "GET", path)
        assert (answer.status_code, "expired" in answer.json()["detail"]) == (404, True)
    assert not (folder / "jobs" / job).exists()


def test_output_that_is_not_there_yet(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    job = submit(api, key, ["one"])
    answer = ask(api, key, "GET", f"/v1/batch/{job}/output")
    assert (answer.status_code, answer.json()["code"]) == (409, "CONFLICT_RESOURCE_BUSY")
    cancelled = ask(api, key, "DELETE", f"/v1/batch/{job}").json()
    assert (cancelled["status"], cancelled["output_url"]) == ("cancelled", None)
    assert ask(api, key, "DELETE", f"/v1/batch/{job}").json()["status"] == "cancelled"  # the answer may have been lost
    assert ask(api, key, "GET", f"/v1/batch/{job}/output").text == ""


def test_output_is_json_lines(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    found = work(api, key, submit(api, key, [{"custom_id": "a", "input": "one"}]))
    [row] = [json.loads(line) for line in ask(api, "", "GET", found["output_url"]).text.splitlines()]
    assert list(row) == ["id", "custom_id", "response", "error"]


def test_what_a_killed_process_left_is_removed(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    kept = submit(api, key, ["one"])
    stray = folder / "jobs" / "batch_stray"
    stray.mkdir()
    (stray / "input").write_text("x")
    young = folder / "jobs" / "batch_young"
    young.mkdir()
    upload = folder / "files" / "file-stray"
    upload.parent.mkdir(exist_ok=True)
    upload.write_text("x")
    for path in (stray, upload, folder / "jobs" / kept):
        os.utime(path, (0, 0))

    async def swept() -> bool:
        return not stray.exists() and not upload.exists()

    work_until(api, swept)
    assert young.exists()
    assert (folder / "jobs" / kept).exists()


def test_bytes_stay_where_the_store_may_know_them(api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, store = new_key(api, folder), api.app.state.parts.store
    before, write = {path.name for path in (folder / "jobs").iterdir()}, store.write

    @asynccontextmanager
    async def deaf() -> AsyncIterator[AsyncConnection]:
        async with write() as connection:
            yield connection
        raise UnavailableError("The store does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", deaf)
        sent = ask(api, key, "POST", "/v1/files", files={"file": ("lines.jsonl", b'{"input": "one"}')})
        made = ask(api, key, "POST", "/v1/batch/embeddings", json={"model": MODEL, "input": ["one"]})
    assert (sent.status_code, made.status_code) == (503, 503)
    [upload] = ask(api, key, "GET", "/v1/files").json()["data"]
    assert ask(api, key, "GET", f"/v1/files/{upload['id']}/content").content == b'{"input": "one"}'
    [job] = {path.name for path in (folder / "jobs").iterdir()} - before
    assert work(api, key, job)["status"] == "completed"


def test_what_another_stores_rows_may_know_stays(api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = folder / "jobs" / "batch_of_another"
    stray.mkdir(parents=True)
    os.utime(stray, (0, 0))
    key = new_key(api, folder)
    work(api, key, submit(api, key, ["one"]))  # whoever works first has the files
    stray.mkdir(exist_ok=True)
    os.utime(stray, (0, 0))
    monkeypatch.setattr(housekeeping, "name_of", lambda *_, shared: "postgresql://elsewhere/fundament")
    monkeypatch.setattr(housekeeping, "_STRAY_SECONDS", 0.0)
    api.run(housekeeping.sweep(api.app.state.parts))
    assert stray.exists()
    monkeypatch.undo()
    monkeypatch.setattr(housekeeping, "_STRAY_SECONDS", 0.0)
    api.run(housekeeping.sweep(api.app.state.parts))
    assert not stray.exists()


def test_a_batch_knows_its_model_from_the_start(api: Api, folder: Path) -> None:
    key = new_key(api, folder)
    line = {"custom_id": "a", "body": {"model": "sentence-transformers/all-MiniLM-L6-v2", "input": "x"}}
    sent = ask(api, key, "POST", "/v1/files", files={"file": ("a.jsonl", json.dumps(line))}, data={"purpose": "batch"})
    asked = {"input_file_id": sent.json()["id"], "endpoint": "/v1/embeddings"}
    made = ask(api, key, "POST", "/v1/batches", json=asked).json()
    assert made["model"] == MODEL
    assert made.keys() == OpenAIBatch.model_fields.keys()  # as the document says


def test_a_job_waits_while_the_process_has_no_files_left(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = new_key(api, folder)
    job, read_part, n_tries = submit(api, key, ["one"]), Directory.read_part, 0

    async def refusing(depot: Directory, name: str, *, start: int, n_bytes: int) -> bytes:
        nonlocal n_tries
        n_tries += 1
        if n_tries == 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await read_part(depot, name, start=start, n_bytes=n_bytes)

    monkeypatch.setattr(Directory, "read_part", refusing)
    assert work(api, key, job)["status"] == "completed"
    assert n_tries >= 2  # more where a loaded machine lets its lease lapse


def test_a_chunk_is_put_off_once_the_store_answers_and_no_worker_has_died_over_it(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, put_off, reads = new_key(api, folder), leases.put_off, Directory.read_part
    job, n_asked, n_reads = submit(api, key, ["one"]), 0, 0

    async def away(*arguments: Any, **options: Any) -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked <= 3:
            raise UnavailableError("The store does not answer.")
        await put_off(*arguments, **options)

    async def read_part(depot: Directory, name: str, *, start: int, n_bytes: int) -> bytes:
        nonlocal n_reads
        n_reads += 1
        if n_reads == 1:
            raise UnavailableError("The bucket does not answer.")
        return await reads(depot, name, start=start, n_bytes=n_bytes)

    monkeypatch.setattr(leases, "put_off", away)
    monkeypatch.setattr(Directory, "read_part", read_part)
    monkeypatch.setattr(worker_chunks, "_AGAIN_SECONDS", 0)
    assert work(api, key, job)["status"] == "completed"
    assert n_asked == 4

    async def tries() -> list[int]:
        async with api.app.state.parts.store.read() as connection:
            mine = select(chunks.c.n_tries).where(chunks.c.job_id == job)
            return [*(await connection.execute(mine)).scalars()]

    assert api.run(tries()) == [1]  # the one that did it


def test_a_key_whose_webhooks_are_slow_holds_up_its_own_alone(
    api: Api, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_AT_A_TIME", 0)
    monkeypatch.setattr(webhooks, "_OF_A_KEY", 1)
    slow, quick, answers = new_key(api, folder), new_key(api, folder), threading.Event()
    in_time: list[bool] = []  # that the slow ones have answered
    with website() as site:

        def wait(handler: BaseHTTPRequestHandler) -> None:
            in_time.append(answers.wait(PATIENCE_SECONDS))
            handler.send_response(200)
            handler.end_headers()

        hooks = [(slow, site.serve("/slow", wait))] * 2 + [(quick, site.say("/quick"))]
        for key, url in hooks:
            asked = {"model": MODEL, "input": ["x"], "webhook_url": url}
            work(api, key, ask(api, key, "POST", "/v1/batch/embeddings", json=asked).json()["batch_id"])
        monkeypatch.setattr(webhooks, "_AT_A_TIME", 2)

        async def told() -> bool:
            return any(each.path == "/quick" for each in site.asked)

        try:
            work_until(api, told)
            assert not in_time
        finally:
            answers.set()
