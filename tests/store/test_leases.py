"""What workers take of jobs, hold and let go, on both databases."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store import jobs, keys, leases
from fundament.store.database import Database
from fundament.store.leases import Span
from tests.store.table import DONE, LATER, LEASE, NOW, SOON, Table


async def count_chunks(connection: AsyncConnection) -> int:
    return int((await connection.execute(select(func.count()).select_from(jobs.chunks))).scalar_one())


def test_an_input_is_read_by_one_and_by_another_where_that_one_dies(table: Table) -> None:
    table.add()
    assert table.claim("one") == "batch_1"
    assert table.claim("two", SOON) is None
    assert table.claim("two", LATER) == "batch_1"
    spans = [Span(start=0, n_bytes=9, first_line=0, n_lines=1)]
    read = {"model": "m", "n_bytes": 9, "spans": spans, "now": LATER}
    assert not table.do(leases.divide, "batch_1", "one", input_name="lines.1", **read)
    assert table.do(leases.divide, "batch_1", "two", input_name="lines.2", **read)
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
    assert [table.do(leases.holds, lost, who) for who in ("one", "two")] == [False, True]
    assert table.get().n_completed == 0
    assert table.finish(again, "two")
    assert not table.finish(again, "two")
    assert table.get().n_completed == 2


def test_a_lease_that_is_renewed_stays(table: Table) -> None:
    table.running(n_chunks=1)
    chunk = table.take("one")
    assert chunk is not None
    assert table.do(leases.beat, "one", [chunk.id], [], until=LATER + LEASE) == {chunk.id}
    assert table.do(leases.beat, "two", [chunk.id], [], until=LATER + LEASE) == set()
    assert table.take("two", at=LATER) is None


def test_what_a_worker_lets_go_is_taken_at_once(table: Table) -> None:
    table.running(n_chunks=1)
    table.take("one")
    table.do(leases.release, "one")
    assert table.take("two") is not None


def test_a_worker_takes_what_its_models_can_run(table: Table) -> None:
    table.running()
    assert table.take("one", models=("other",)) is None


def test_a_job_is_left_to_workers_that_have_its_files(table: Table) -> None:
    table.add()
    assert table.claim("one", depot="elsewhere") is None
    assert table.claim("two") == "batch_1"
    spans = [Span(start=0, n_bytes=9, first_line=0, n_lines=1)]
    assert table.do(leases.divide, "batch_1", "two", model="m", n_bytes=9, spans=spans, now=NOW)
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
    table.do(leases.put_off, chunk, "two", n_admitted=5, until=LATER)  # not its own
    table.do(leases.put_off, chunk, "one", n_admitted=5, until=SOON)
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
    assert table.do(leases.finish, chunk, "one", DONE, now=SOON, failure="no more")
    assert (table.get().state, table.get().error, table.get().n_completed) == ("failed", "no more", 2)


def test_tries_are_counted_where_a_worker_dies(table: Table) -> None:
    table.running(n_chunks=1)
    for letting_go in (
        lambda chunk: table.do(leases.release, "one"),
        lambda chunk: table.do(leases.put_off, chunk, "one", n_admitted=0, until=NOW),
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
    table.do(leases.split, chunk, "two", spans)
    table.do(leases.split, chunk, "one", spans)
    table.do(leases.split, chunk, "one", spans)
    assert not table.finish(chunk, "one")
    taken = [table.take("two") for _ in range(4)]
    assert [(each.span.first_line, each.n_tries) for each in taken if each] == [(0, 2), (1, 2), (2, 2), (3, 1)]


def test_a_job_that_is_cancelled_takes_no_more_and_keeps_what_it_has(table: Table) -> None:
    table.running(n_chunks=3, webhook_url="https://hook.example")
    first, second = table.take("one"), table.take("one")
    assert first is not None
    assert second is not None
    assert table.finish(first, "one")
    ended = table.do(jobs.end, "batch_1", "cancelled", now=SOON)
    assert (ended.state, ended.n_completed, ended.webhook_state) == ("cancelled", 2, "pending")
    assert table.do(jobs.end, "batch_1", "failed", now=SOON) is None
    assert table.do(leases.beat, "one", [second.id], [], until=LATER) == set()
    assert not table.finish(second, "one")
    table.do(leases.split, second, "one", [second.span] * 2)
    assert table.do(count_chunks) == 3
    assert table.take("one") is None
    assert len(table.do(jobs.parts, "batch_1", "output")) == 1


def test_many_workers_take_every_chunk_once(store: Database, table: Table, runner: asyncio.Runner) -> None:
    table.running(n_chunks=40)

    async def worker(name: str) -> list[int]:
        taken = []
        while True:
            async with store.write() as connection:
                found = await leases.take(connection, name, "here", ["m"], now=NOW, until=NOW + LEASE)
            if found is None:
                return taken
            async with store.write() as connection:
                assert await leases.finish(connection, found[1], name, DONE, now=SOON)
            taken.append(found[1].span.first_line)

    async def race() -> list[list[int]]:
        return await asyncio.gather(*(worker(f"w{number}") for number in range(4)))

    taken = runner.run(race())
    assert sorted(number for each in taken for number in each) == [3 * number for number in range(40)]
    assert (table.get().state, table.get().n_completed) == ("completed", 80)


@pytest.mark.parametrize("store_url", ["postgres"], indirect=True)  # SQLite has one writer at a time
@pytest.mark.parametrize("name", ["finish", "put_off"])
def test_a_chunk_is_free_while_its_job_is_held_by_another(
    store: Database, table: Table, runner: asyncio.Runner, name: str
) -> None:
    """Else the other, which holds the job and wants its chunks, would wait for who waits for it."""
    table.running()
    chunk = table.take("one")
    assert chunk is not None

    async def let_go() -> None:
        async with store.write() as connection:
            if name == "finish":
                assert await leases.finish(connection, chunk, "one", DONE, now=SOON)
            else:
                await leases.put_off(connection, chunk, "one", n_admitted=0, until=NOW)

    async def work() -> None:
        async with store.write() as connection:
            assert await jobs.hold(connection, "batch_1") == "running"
            letting_go = asyncio.ensure_future(let_go())
            async with asyncio.timeout(30):
                while not (await connection.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))).scalar():
                    await asyncio.sleep(0.01)
            await connection.execute(select(jobs.chunks.c.id).with_for_update(nowait=True))
        await letting_go

    runner.run(work())
