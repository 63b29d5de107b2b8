"""Jobs that end badly, and caps that hold however many ask at once, on both databases."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from fundament.store import jobs
from fundament.worker import Worker
from tests.inprocess import Api, running, work_until
from tests.served import MODEL
from tests.website import website


@pytest.fixture
def api(tmp_path: Path, store_url: str) -> Iterator[Api]:
    settings = {"max_jobs_per_key": 5, "max_stored_mb_per_key": 0.1, "allowed_networks": ["127.0.0.1/32"]}
    with running(tmp_path / "data", store_url=store_url, worker=False, preload=False, **settings) as api:
        yield api


def at_once(api: Api, n: int, path: str, **body: Any) -> Counter[int]:
    """How often each status came to requests that are sent together."""

    async def ask() -> list[httpx.Response]:
        return await asyncio.gather(*(api.client.post(path, **body) for _ in range(n)))

    return Counter(answer.status_code for answer in api.run(ask()))


def upload(api: Api, body: bytes) -> str:
    sent = api.run(api.client.post("/v1/files", files={"file": ("x.jsonl", body)}))
    assert sent.status_code == 200, sent.text
    return str(sent.json()["id"])


def work(api: Api, job: str) -> dict[str, Any]:
    """Run a worker until a batch of OpenAI's has ended."""

    async def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = (await api.client.get(f"/v1/batches/{job}")).json()
        return None if found["status"] in ("validating", "in_progress") else found

    found: dict[str, Any] = work_until(api, ended)
    return found


def submit(api: Api, body: bytes) -> httpx.Response:
    asked = {"input_file_id": upload(api, body), "endpoint": "/v1/embeddings"}
    return api.run(api.client.post("/v1/batches", json=asked))


def test_a_job_whose_first_line_names_no_model_that_can_be_said(api: Api) -> None:
    line = json.dumps({"custom_id": "1", "body": {"model": "a\0b", "input": "x"}})
    found = work(api, submit(api, line.encode()).json()["id"])
    assert found["status"] == "failed"
    assert "Model 'ab' not found" in found["errors"]["data"][0]["message"]


def test_no_more_jobs_are_taken_than_a_key_may_have(api: Api) -> None:
    body = {"model": MODEL, "input": ["x"]}
    assert at_once(api, 40, "/v1/batch/embeddings", json=body) == {200: 5, 429: 35}


def test_no_more_bytes_are_taken_than_a_key_may_keep(api: Api) -> None:
    assert at_once(api, 40, "/v1/files", files={"file": ("x.jsonl", bytes(30_000))}) == {200: 3, 413: 37}


def test_what_is_fetched_counts(api: Api, tmp_path: Path) -> None:
    with website() as site:
        fits, large = site.say("/fits", b'"x"\n' * 10_000), site.say("/large", b'"x"\n' * 16_000)
        handed_in = []
        for url in (fits, large):
            asked = api.run(api.client.post("/v1/batch/embeddings", json={"model": MODEL, "input_url": url}))
            handed_in.append(asked.json()["batch_id"])

        async def failed() -> list[dict[str, Any]] | None:
            found = [(await api.client.get(f"/v1/batch/{job}")).json() for job in handed_in]
            ended = [each["batch_id"] for each in found if each["status"] == "failed"]
            # What was fetched goes behind the end, and a worker that is given up in between leaves it to the sweep.
            return found if ended and not list((tmp_path / "data" / "jobs" / ended[0]).iterdir()) else None

        one, other = sorted(work_until(api, failed), key=lambda each: str(each["status"]))
    assert one["status"] == "failed"
    assert "MB of 0.1 MB" in one["error"]
    assert other["status"] in ("processing", "completed")


def test_a_webhook_tells_what_happened_even_after_the_job_has_expired(api: Api) -> None:
    with website() as site:
        url = site.say("/hook", status=500)
        fields = {"model": MODEL, "input": ["x"], "webhook_url": url}
        job = api.run(api.client.post("/v1/batch/embeddings", json=fields)).json()["batch_id"]

        async def told() -> bool:
            return len(site.asked) == 1

        work_until(api, told)

        async def age() -> None:
            now = datetime.now(UTC)
            async with api.app.state.parts.store.write() as connection:
                assert await jobs.expire(connection, now=now + timedelta(days=2)) == [job]
                due = update(jobs.jobs).where(jobs.jobs.c.id == job).values(webhook_at=now, webhook_state="pending")
                await connection.execute(due)

        api.run(age())
        site.say("/hook")

        async def told_again() -> bool:
            return len(site.asked) == 2

        work_until(api, told_again)
    first, again = site.asked
    then, now = json.loads(first.body), json.loads(again.body)
    assert then["type"] == "batch.completed"
    assert then["data"].pop("output_url").startswith("http")
    assert now["data"].pop("output_url") is None  # it is gone
    assert then == now
    assert [each.headers["webhook-id"] for each in site.asked] == [f"{job}.completed"] * 2


def test_a_webhook_tells_that_a_job_has_expired(api: Api) -> None:
    with website() as site:
        fields = {"model": MODEL, "input_url": site.say("/lines", b'"x"\n'), "webhook_url": site.say("/hook")}
        job = api.run(api.client.post("/v1/batch/embeddings", json=fields)).json()["batch_id"]

        async def age() -> None:
            async with api.app.state.parts.store.write() as connection:
                assert await jobs.expire(connection, now=datetime.now(UTC) + timedelta(days=2)) == [job]
                due = update(jobs.jobs).where(jobs.jobs.c.id == job).values(webhook_at=datetime.now(UTC))
                await connection.execute(due)

        async def told() -> bool:
            return len(site.asked) == 1

        api.run(age())
        work_until(api, told)
    [asked] = site.asked
    body = json.loads(asked.body)
    assert (body["type"], body["data"]["status"], body["data"]["output_url"]) == ("batch.expired", "expired", None)
    assert asked.headers["webhook-id"] == f"{job}.expired"


def test_results_count(api: Api) -> None:
    asked = api.run(api.client.post("/v1/batch/embeddings", json={"model": MODEL, "input": ["x"] * 40}))

    async def completed() -> bool:
        found = (await api.client.get(f"/v1/batch/{asked.json()['batch_id']}")).json()
        return bool(found["status"] == "completed")

    work_until(api, completed)
    assert at_once(api, 1, "/v1/files", files={"file": ("x.jsonl", b"x")}) == {413: 1}


@pytest.mark.parametrize("n_steps", range(4))
def test_a_worker_that_is_woken_while_it_ends_ends(api: Api, n_steps: int) -> None:
    async def work() -> None:
        worker = Worker(api.app.state.parts)
        waiting = asyncio.ensure_future(worker._work())
        while not worker._woken._waiters:  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
        worker.wake()
        for _ in range(n_steps):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting], timeout=10)
        assert waiting.done()
        # It may have been through before it heard, but never goes on as if it had heard nothing.
        assert waiting.cancelled() or waiting.cancelling() == 0

    api.run(work())
