"""What owners see of jobs, how jobs end and what then becomes of them, on both databases."""

from dataclasses import asdict
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store import files, jobs
from tests.store.table import LATER, LEASE, NOW, Table


def test_a_reason_may_quote_anything(table: Table) -> None:
    table.add(webhook_url="https://hook.example")
    ended = table.do(jobs.end, "batch_1", "failed", now=NOW, error="no model 'a\0b' or '\ud800'")
    assert ended.error == "no model 'ab' or '?'"
    table.do(jobs.called, "batch_1", "failed", "\0")
    assert table.get().webhook_error == ""


def test_a_job_expires_whatever_it_was_doing(table: Table) -> None:
    table.running(n_chunks=1)
    chunk = table.take("one")
    assert chunk is not None
    day = NOW + timedelta(hours=24)
    assert table.do(jobs.expire, now=day - timedelta(seconds=1)) == []
    assert table.do(jobs.expire, now=day) == ["batch_1"]
    assert table.do(jobs.expire, now=day) == []
    assert table.get().state == "expired"
    assert not table.finish(chunk, "one")
    table.do(jobs.forget, before=day + timedelta(days=1))
    assert table.do(jobs.get, "batch_1") is None


def test_a_webhook_is_taken_once_and_later_again(table: Table) -> None:
    table.add(webhook_url="https://hook.example")
    delays = [timedelta(seconds=5), timedelta(seconds=50)]
    assert table.do(jobs.call, "here", delays, now=NOW) is None
    table.do(jobs.end, "batch_1", "failed", now=NOW, error="no")
    job = table.do(jobs.call, "here", delays, now=NOW)
    assert (job.webhook_attempts, job.webhook_at) == (1, NOW + delays[0])
    assert table.do(jobs.call, "here", delays, now=NOW) is None
    table.do(jobs.called, "batch_1", "pending", "The URL answered 500.")
    job = table.do(jobs.call, "here", delays, now=NOW + delays[0])
    assert (job.webhook_attempts, job.webhook_error) == (2, "The URL answered 500.")
    assert job.webhook_at == NOW + delays[0] + delays[1]
    table.do(jobs.called, "batch_1", "delivered", None)
    table.do(jobs.called, "batch_1", "pending", "The URL answered 409.")  # a try that took longer
    assert table.do(jobs.call, "here", delays, now=LATER + timedelta(days=1)) is None


def test_a_webhook_is_due_where_its_job_expires(table: Table) -> None:
    table.add(webhook_url="https://hook.example")
    day = NOW + timedelta(hours=24)
    assert table.do(jobs.expire, now=day) == ["batch_1"]
    job = table.do(jobs.call, "here", [timedelta(seconds=5)], now=day)
    assert (job.state, job.outcome, job.ended_at) == ("expired", None, day)


def test_jobs_are_listed_by_key_and_page(table: Table) -> None:
    for number in range(3):
        table.add(f"batch_{number}", key_id="mine", at=NOW + timedelta(seconds=number))
    table.add("batch_other", key_id="other")
    listed = table.do(jobs.recent, "mine", ["batch"], limit=2)
    assert [job.id for job in listed] == ["batch_2", "batch_1"]
    place = listed[1].created_at, listed[1].id
    after = table.do(jobs.recent, "mine", ["batch"], limit=2, beyond=place)
    assert [job.id for job in after] == ["batch_0"]
    newer = table.do(jobs.recent, "mine", ["batch"], limit=2, beyond=place, oldest_first=True)
    assert [job.id for job in newer] == ["batch_2"]
    assert table.do(jobs.recent, "mine", ["openai"], limit=2) == []
    assert table.do(jobs.get, "batch_other", "mine") is None
    assert table.do(jobs.active, "mine") == (3, 300)


def test_results_are_listed_and_forgotten(table: Table) -> None:
    def listed(kind: str, **which: Any) -> list[tuple[str, int]]:
        found = table.do(jobs.results, "mine", ["batch"], kind, **{"limit": 9, **which})
        return [(job.id, n_bytes) for job, n_bytes in found]

    table.running(n_chunks=2, key_id="mine")
    for _ in range(2):
        chunk = table.take("one")
        assert chunk is not None
        assert listed("output") == []
        table.finish(chunk, "one")
    assert listed("output") == [("batch_1", 20)]
    assert listed("errors") == [("batch_1", 10)]
    place = table.get().ended_at, jobs.result_id("batch_1", "output")
    for oldest_first in (False, True):
        assert len(listed("errors", beyond=place, oldest_first=oldest_first)) == int(not oldest_first)
        assert listed("output", beyond=place, oldest_first=oldest_first) == []
    assert table.do(jobs.active, "mine") == (0, 60 + 30)
    assert table.do(jobs.drop_parts, "batch_1", "output") == ["out", "out"]
    assert table.do(jobs.drop_parts, "batch_1", "output") == []
    assert listed("output") == []
    assert table.do(jobs.active, "mine") == (0, 60 + 10)
    table.do(jobs.expire, now=NOW + timedelta(hours=24))
    assert listed("errors") == []


def test_however_many_ids_are_asked_for_and_expire(table: Table) -> None:
    job = {**asdict(table.add()), "state": "completed", "outcome": "completed"}
    ids = [f"batch_{number}" for number in range(70_000)]

    async def more(connection: AsyncConnection) -> None:
        await connection.execute(jobs.jobs.insert(), [{**job, "id": each} for each in ids if each != "batch_1"])

    table.do(more)
    assert table.do(jobs.kept, ids) == {*ids}
    assert table.do(files.kept, ids) == set()
    assert len(table.do(jobs.expire, now=NOW + timedelta(hours=24))) == len(ids)
    assert table.do(jobs.kept, ids) == set()


def test_jobs_elsewhere_are_counted_and_their_webhooks_left_to_others(table: Table) -> None:
    table.add(webhook_url="http://x.example")
    assert (table.do(jobs.elsewhere, "here"), table.do(jobs.elsewhere, "there")) == (0, 1)
    table.do(jobs.end, "batch_1", "failed", now=NOW)
    assert table.do(jobs.elsewhere, "there") == 0
    assert table.do(jobs.call, "there", [LEASE], now=LATER) is None
    assert table.do(jobs.call, "here", [LEASE], now=LATER).id == "batch_1"


def test_the_backlog_counts_what_has_not_ended(table: Table) -> None:
    assert table.do(jobs.backlog) == {"queued": (0, 0), "running": (0, 0)}
    table.running()
    table.add("batch_2", key_id="other")
    assert table.do(jobs.backlog) == {"queued": (1, 0), "running": (1, 6)}
    for left in (3, 0):
        chunk = table.take("one")
        assert chunk is not None
        assert table.finish(chunk, "one")
        assert table.do(jobs.backlog) == {"queued": (1, 0), "running": (1, 3) if left else (0, 0)}
