"""Jobs and uploads whose files lie in a bucket: how they end, and what is said while it does not answer."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from fundament import buckets
from fundament.depot import of_job, of_upload, whole
from fundament.store.jobs import jobs
from fundament.worker import housekeeping
from tests.inprocess import Api, running, work_until
from tests.relay import Relay, relay
from tests.served import MODEL
from tests.servers import bucket_on


@pytest.fixture
def way(s3_url: str) -> Iterator[Relay]:
    """The way to the S3 server."""
    with relay(s3_url) as way:
        yield way


@pytest.fixture
def files_url(s3_url: str, way: Relay, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(buckets._RETRIES, "max_retries", 0)  # type: ignore[misc]
    with bucket_on(s3_url, through=way.url) as url:
        yield url


@pytest.fixture
def api(files_url: str, tmp_path: Path) -> Iterator[Api]:
    """An application whose worker runs where a test says so."""
    with running(tmp_path, worker=False, files_url=files_url) as api:
        yield api


def ask(api: Api, method: str, path: str, **options: Any) -> httpx.Response:
    return api.run(api.client.request(method, path, **options))


def upload(api: Api, body: bytes = b'"one"\n') -> httpx.Response:
    return ask(api, "POST", "/v1/files", files={"file": ("lines é.jsonl", body)})


def submit(api: Api, **fields: object) -> httpx.Response:
    return ask(api, "POST", "/v1/batch/embeddings", json={"model": MODEL, **fields})


def work(api: Api, job: str) -> dict[str, Any]:
    """Run a worker until a job has ended."""

    async def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = (await api.client.get(f"/v1/batch/{job}")).json()
        return None if found["status"] in ("pending", "processing") else found

    found: dict[str, Any] = work_until(api, ended)
    return found


def is_there(api: Api, name: str) -> bool:
    try:
        api.run(whole(api.app.state.parts.depot.read(name)))
    except FileNotFoundError:
        return False
    return True


def test_nothing_lies_in_the_data_directory(api: Api, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    file = upload(api).json()["id"]
    job = submit(api, input=["one"]).json()["batch_id"]
    assert work(api, job)["status"] == "completed"
    assert is_there(api, of_upload(file))
    assert {path.name.partition("-")[0] for path in {*tmp_path.rglob("*")} - before} <= {"fundament.db"}


def test_an_upload_is_given_back_and_deleted(api: Api) -> None:
    body = b'"one"\n' * 500_000
    file = upload(api, body).json()["id"]
    got = ask(api, "GET", f"/v1/files/{file}/content")
    assert got.content == body
    assert got.headers["content-disposition"] == "attachment; filename*=utf-8''lines%20%C3%A9.jsonl"
    assert ask(api, "DELETE", f"/v1/files/{file}").is_success
    assert not is_there(api, of_upload(file))


def test_what_is_refused_leaves_nothing(api: Api) -> None:
    assert ask(api, "POST", "/v1/files", files={"other": ("x", b"x" * 1000)}).status_code == 422
    form = {"files": {"file": ("x", b"x" * 1000)}, "data": {"purpose": "fine-tune"}}
    assert ask(api, "POST", "/v1/files", **form).status_code == 422
    assert submit(api, input_file_id="file-none").status_code == 404
    depot = api.app.state.parts.depot
    assert api.run(depot.old("files", seconds=-60)) == api.run(depot.old("jobs", seconds=-60)) == []


def test_a_job_expires_with_its_files(api: Api) -> None:
    job = submit(api, input=["one"]).json()["batch_id"]
    link = work(api, job)["output_url"]
    assert ask(api, "GET", link).is_success

    async def age() -> None:
        async with api.app.state.parts.store.write() as connection:
            over = datetime.now(UTC) - timedelta(seconds=1)
            await connection.execute(update(jobs).where(jobs.c.id == job).values(expires_at=over))

    async def removed() -> bool:
        return not await api.app.state.parts.depot.old("jobs", seconds=-60)

    api.run(age())
    work_until(api, removed)
    assert ask(api, "GET", link).status_code == 404


def test_what_no_row_knows_is_swept(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    depot = api.app.state.parts.depot
    kept = submit(api, input=["one"]).json()["batch_id"]

    async def leave() -> None:
        for name in (of_job("batch_stray", "input"), of_upload("file-stray")):
            await depot.copy(of_job(kept, "input"), name)

    async def swept() -> bool:
        left = await depot.old("jobs", seconds=-60), await depot.old("files", seconds=-60)
        return left == ([kept], [])

    api.run(leave())
    monkeypatch.setattr(housekeeping, "_STRAY_SECONDS", -60.0)
    work_until(api, swept)


def test_a_link_of_one_server_opens_on_another(api: Api, files_url: str, tmp_path: Path) -> None:
    job = submit(api, input=["one"]).json()["batch_id"]
    link = work(api, job)["output_url"]
    (tmp_path / "other").mkdir()
    store = f"sqlite:///{tmp_path / 'fundament.db'}"
    with running(tmp_path / "other", worker=False, files_url=files_url, store_url=store) as other:
        assert ask(other, "GET", link).content == ask(api, "GET", link).content


def test_a_bucket_that_does_not_answer_is_503_and_costs_nothing_else(api: Api, way: Relay) -> None:
    file = upload(api).json()["id"]
    job = submit(api, input=["one"]).json()["batch_id"]
    link = work(api, job)["output_url"]
    waiting = submit(api, input=["two"]).json()["batch_id"]
    way.cut()
    for answer in (
        upload(api),
        upload(api, bytes(20_000_000)),
        submit(api, input=["x"]),
        submit(api, input_file_id=file),
        ask(api, "GET", f"/v1/files/{file}/content"),
        ask(api, "GET", link),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert "cannot be reached now" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) > 0
    assert api.run(api.embed("still here")).is_success
    assert ask(api, "GET", f"/v1/batch/{job}").json()["output_url"] == link
    assert ask(api, "DELETE", f"/v1/files/{file}").is_success  # its bytes are left to the sweep
    way.mend()
    assert is_there(api, of_upload(file))
    assert work(api, waiting)["status"] == "completed"
    assert [each["batch_id"] for each in ask(api, "GET", "/v1/batches").json()] == [waiting, job]


def test_bytes_that_are_gone_are_said_to_be(api: Api) -> None:
    file = upload(api).json()["id"]
    api.run(api.app.state.parts.depot.remove(of_upload(file)))
    answer = ask(api, "GET", f"/v1/files/{file}/content")
    assert (answer.status_code, "are gone" in answer.json()["detail"]) == (404, True)
