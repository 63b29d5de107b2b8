"""Claims, leases and ends of jobs, on both databases."""

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store import files, jobs, keys
from fundament.store.database import Database
from fundament.store.jobs import Chunk, Job, Span, Written

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
LEASE = timedelta(seconds=20)
SOON, LATER = NOW + LEASE / 2, NOW + LEASE * 2
DONE = Written(output="out", n_output_bytes=10, errors="err", n_error_bytes=5, n_completed=2, n_failed=1, n_tokens=7)


class Table:
    """Jobs in a store."""

    def __init__(self, store: Database, runner: asyncio.Runner) -> None:
        self.store, self.runner = store, runner

    def do(self, work: Any, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with self.store.write() as connection:
                return await work(connection, *args, **options)

        return self.runner.run(run())

    def add(self, job_id: str = "batch_1", key_id: str = "", at: datetime = NOW, **options: Any) -> Job:
        job: Job = self.do(
            jobs.create,
            job_id,
            key_id=key_id,
            depot="here",
            dialect="batch",
            model="m",
            asked={"model": "m"},
            n_bytes=100,
            now=at,
            expires_at=at + timedelta(hours=24),
            **options,
        )
        return job

    def claim(
        self, worker: str, at: datetime = NOW, *, depot: str = "here", fetched: bool = False, most: int = 4
    ) -> str | None:
        job = self.do(jobs.claim, worker, depot, fetched=fetched, most=most, now=at, until=at + LEASE)
        return None if job is None else job.id

    def running(self, job_id: str = "batch_1", n_chunks: int = 2, **options: Any) -> None:
        """A job that runs."""
        self.add(job_id, **options)
        assert self.claim("reader") == job_id
        spans = [Span(start=30 * n, n_bytes=30, first_line=3 * n, n_lines=3) for n in range(n_chunks)]
        assert self.do(jobs.divide, job_id, "reader", model="m", n_bytes=60, spans=spans, now=NOW)

    def take(
        self, worker: str, at: datetime = NOW, *, depot: str = "here", models: tuple[str, ...] = ("m",)
    ) -> Chunk | None:
        taken = self.do(jobs.take, worker, depot, models, now=at, until=at + LEASE)
        return None if taken is None else taken[1]

    def finish(self, chunk: Chunk, worker: str) -> bool:
        return bool(self.do(jobs.finish, chunk, worker, DONE, now=SOON))

    def get(self, job_id: str = "batch_1") -> Job:
        job: Job = self.do(jobs.get, job_id)
        return job


@pytest.fixture
def table(store: Database, runner: asyncio.Runner) -> Table:
    return Table(store, runner)


def test_an_input_is_read_by_one_and_by_another_where_that_one_dies(table: Table) -> None:
    table.add()
    assert table.claim("one") == "batch_1"
    assert table.claim("two", SOON) is None
    assert table.claim("two", LATER) == "batch_1"
    spans = [Span(start=0, n_bytes=9, first_line=0, n_lines=1)]
    read = {"model": "m", "n_bytes": 9, "spans": spans, "now": LATER}
    assert not table.do(jobs.divide, "batch_1", "one", input_name="lines.1", **read)
    assert table.do(jobs.divide, "batch_1", "two", input_name="lines.2", **read)
    assert table.get().input_name == "lines.2"
    assert (table.get().state, table.get().n_lines, table.get().n_bytes) == ("running", 1, 9)


def test_chunks_are_taken_in_order_each_once(table: Table) -> None:
    table.running()
    one, two = table.take("one"), table.take("two")
    assert one is not None
    assert two is not None
    assert [one.span.first_line, two.span.first_line] == [0, 3]
    assert table.take("three") is None
    assert table.finish(two, "two")
    assert table.get().state == "running"
    assert table.finish(one, "one")
    job = table.get()
    assert (job.state, job.n_completed, job.n_failed, job.n_tokens) == ("completed", 4, 2, 14)
    assert job.ended_at == SOON
    assert [part.n_bytes for part in table.do(jobs.parts, "batch_1", "output")] == [10, 10]


def test_a_chunk_whose_worker_is_gone_goes_to_another_and_counts_once(table: Table) -> None:
    table.running(n_chunks=1)
    lost = table.take("one")
    assert lost is not None
    assert table.take("two", at=SOON) is None
    again = table.take("two", at=LATER)
    assert again is not None
    assert again.span == lost.span
    assert not table.finish(lost, "one")
    assert table.get().n_completed == 0
    assert table.finish(again, "two")
    assert not table.finish(again, "two")
    assert table.get().n_completed == 2


def test_a_lease_that_is_renewed_stays(table: Table) -> None:
    table.running(n_chunks=1)
    chunk = table.take("one")
    assert chunk is not None
    assert table.do(jobs.beat, "one", [chunk.id], [], until=LATER + LEASE) == {chunk.id}
    assert table.do(jobs.beat, "two", [chunk.id], [], until=LATER + LEASE) == set()
    assert table.take("two", at=LATER) is None


def test_what_a_worker_lets_go_is_taken_at_once(table: Table) -> None:
    table.running(n_chunks=1)
    table.take("one")
    table.do(jobs.release, "one")
    assert table.take("two") is not None


def test_a_worker_takes_what_its_models_can_run(table: Table) -> None:
    table.running()
    assert table.take("one", models=("other",)) is None


def test_a_job_is_left_to_workers_that_have_its_files(table: Table) -> None:
    table.add()
    assert table.claim("one", depot="elsewhere") is None
    assert table.claim("two") == "batch_1"
    spans = [Span(start=0, n_bytes=9, first_line=0, n_lines=1)]
    assert table.do(jobs.divide, "batch_1", "two", model="m", n_bytes=9, spans=spans, now=NOW)
    assert table.take("one", depot="elsewhere") is None
    assert table.take("two") is not None


def test_a_job_of_an_older_release_is_anybodys(table: Table) -> None:
    table.add()
    table.do(_forget_depot)
    assert table.claim("one", depot="elsewhere") == "batch_1"


async def _forget_depot(connection: AsyncConnection) -> None:
    await connection.execute(update(jobs.jobs).values(depot=None))


def test_keys_take_turns_whatever_the_size_of_their_jobs(table: Table) -> None:
    table.running("batch_a", n_chunks=5, key_id="large")
    table.running("batch_b", n_chunks=2, key_id="small", at=NOW + timedelta(seconds=1))
    taken = [table.take("one") for _ in range(5)]
    assert [chunk.job_id for chunk in taken if chunk] == ["batch_a", "batch_b", "batch_a", "batch_b", "batch_a"]


def test_inputs_are_read_in_turns_of_keys_and_those_that_are_fetched_apart(table: Table) -> None:
    for number in range(4):
        table.add(f"batch_a{number}", key_id="large", at=NOW + timedelta(seconds=number), url="https://slow.example")
    table.add("batch_b", key_id="small", at=LATER, url="https://slow.example")
    table.add("batch_c", key_id="large", at=LATER)
    assert [table.claim("one", LATER, fetched=True) for _ in range(3)] == ["batch_a0", "batch_b", "batch_a1"]
    assert table.claim("one", LATER, fetched=True, most=2) is None  # of one key; another worker may
    assert table.claim("two", LATER, fetched=True, most=2) == "batch_a2"
    assert table.claim("one", LATER) == "batch_c"
    assert table.claim("one", LATER) is None


def test_a_job_that_is_put_off_waits_and_lets_others_run(table: Table) -> None:
    table.running("batch_a", n_chunks=2, key_id="large")
    table.running("batch_b", n_chunks=1, key_id="small", at=NOW + timedelta(seconds=1))
    chunk = table.take("one")
    assert chunk is not None
    assert chunk.job_id == "batch_a"
    table.do(jobs.put_off, chunk, "two", n_admitted=5, until=LATER)  # not its own
    table.do(jobs.put_off, chunk, "one", n_admitted=5, until=SOON)
    taken = table.take("one")
    assert taken is not None
    assert taken.job_id == "batch_b"
    assert table.take("one") is None
    again = table.take("one", SOON)
    assert again is not None
    assert (again.span, again.n_admitted) == (chunk.span, 5)


def test_chunks_of_a_key_with_a_balance_are_taken_one_after_the_other(table: Table) -> None:
    key, _ = table.do(keys.create, "prepaid", tier="free", balance=100)
    table.running(n_chunks=3, key_id=key.id)
    for number in range(3):
        chunk = table.take("one")
        assert chunk is not None
        assert chunk.span.first_line == 3 * number
        assert table.take("two") is None
        assert table.finish(chunk, "one")
    assert table.get().state == "completed"


def test_a_job_can_fail_with_a_chunk_and_keeps_it(table: Table) -> None:
    table.running(n_chunks=1)
    chunk = table.take("one")
    assert table.do(jobs.finish, chunk, "one", DONE, now=SOON, failure="no more")
    assert (table.get().state, table.get().error, table.get().n_completed) == ("failed", "no more", 2)


def test_tries_are_counted_where_a_worker_dies(table: Table) -> None:
    table.running(n_chunks=1)
    for letting_go in (
        lambda chunk: table.do(jobs.release, "one"),
        lambda chunk: table.do(jobs.put_off, chunk, "one", n_admitted=0, until=NOW),
    ):
        chunk = table.take("one")
        assert chunk is not None
        assert chunk.n_tries == 1
        letting_go(chunk)
    table.take("one")
    again = table.take("two", LATER)
    assert again is not None
    assert again.n_tries == 2


def test_a_chunk_is_split_by_who_holds_it_and_keeps_its_place(table: Table) -> None:
    table.running(n_chunks=2)
    chunk = table.take("one")
    assert chunk is not None
    spans = [Span(start=10 * number, n_bytes=9, first_line=number, n_lines=1) for number in range(3)]
    table.do(jobs.split, chunk, "two", spans)
    table.do(jobs.split, chunk, "one", spans)
    table.do(jobs.split, chunk, "one", spans)
    assert not table.finish(chunk, "one")
    taken = [table.take("two") for _ in range(4)]
    assert [(each.span.first_line, each.n_tries) for each in taken if each] == [(0, 2), (1, 2), (2, 2), (3, 1)]


def test_a_reason_may_quote_anything(table: Table) -> None:
    table.add(webhook_url="https://hook.example")
    ended = table.do(jobs.end, "batch_1", "failed", now=NOW, error="no model 'a\0b' or '\ud800'")
    assert ended.error == "no model 'ab' or '?'"
    table.do(jobs.called, "batch_1", "failed", "\0")
    assert table.get().webhook_error == ""


def test_a_job_that_is_cancelled_takes_no_more_and_keeps_what_it_has(table: Table) -> None:
    table.running(n_chunks=3, webhook_url="https://hook.example")
    first, second = table.take("one"), table.take("one")
    assert first is not None
    assert second is not None
    assert table.finish(first, "one")
    ended = table.do(jobs.end, "batch_1", "cancelled", now=SOON)
    assert (ended.state, ended.n_completed, ended.webhook_state) == ("cancelled", 2, "pending")
    assert table.do(jobs.end, "batch_1", "failed", now=SOON) is None
    assert table.do(jobs.beat, "one", [second.id], [], until=LATER) == set()
    assert not table.finish(second, "one")
    assert table.take("one") is None
    assert len(table.do(jobs.parts, "batch_1", "output")) == 1


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
    assert table.do(jobs.call, "here", delays, now=LATER + timedelta(days=1)) is None


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
    table.running(n_chunks=2, key_id="mine")
    for _ in range(2):
        chunk = table.take("one")
        assert chunk is not None
        assert table.do(jobs.written, "mine", ["batch"]) == []
        table.finish(chunk, "one")
    assert [job.id for job in table.do(jobs.written, "mine", ["batch"])] == ["batch_1"]
    assert table.do(jobs.sizes, ["batch_1"], "errors") == {"batch_1": 10}
    assert table.do(jobs.active, "mine") == (0, 60 + 30)
    assert table.do(jobs.drop_parts, "batch_1", "output") == ["out", "out"]
    assert table.do(jobs.drop_parts, "batch_1", "output") == []
    assert table.do(jobs.sizes, ["batch_1"], "output") == {}
    assert table.do(jobs.active, "mine") == (0, 60 + 10)
    table.do(jobs.expire, now=NOW + timedelta(hours=24))
    assert table.do(jobs.written, "mine", ["batch"]) == []


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


def test_many_workers_take_every_chunk_once(store: Database, table: Table, runner: asyncio.Runner) -> None:
    table.running(n_chunks=40)

    async def worker(name: str) -> list[int]:
        taken = []
        while True:
            async with store.write() as connection:
                found = await jobs.take(connection, name, "here", ["m"], now=NOW, until=NOW + LEASE)
            if found is None:
                return taken
            async with store.write() as connection:
                assert await jobs.finish(connection, found[1], name, DONE, now=SOON)
            taken.append(found[1].span.first_line)

    async def race() -> list[list[int]]:
        return await asyncio.gather(*(worker(f"w{number}") for number in range(4)))

    taken = runner.run(race())
    assert sorted(number for each in taken for number in each) == [3 * number for number in range(40)]
    assert (table.get().state, table.get().n_completed) == ("completed", 80)


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
