"""What workers hold of jobs: inputs that they read, chunks of lines that they run.

A worker holds an input or a chunk by a lease that it keeps renewing; a chunk is done once its row names the file that
holds its output, and the same statement refuses a worker whose lease another one has taken. So a worker may die at any
moment: what is not named never happened.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store import keys
from fundament.store.jobs import Job, chunks, end, get, hold, job_of, jobs, lies_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive lines of an input: where they begin, in bytes and in lines, and how many there are."""

    start: int
    n_bytes: int
    first_line: int
    n_lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A span of a job's input, held by a worker.

    Attributes:
        n_tries: how often it was taken and not let go, this time included: once more than workers died over it.
        n_admitted: tokens that the key's minute has given for it when it was tried before.
    """

    id: int
    job_id: str
    span: Span
    n_tries: int
    n_admitted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What became of a chunk: the files with its output and its errors, and what they count."""

    output: str
    n_output_bytes: int
    errors: str | None
    n_error_bytes: int
    n_completed: int
    n_failed: int
    n_tokens: int


async def claim(
    connection: AsyncConnection, worker: str, depot: str, *, fetched: bool, most: int, now: datetime, until: datetime
) -> Job | None:
    """Take a job whose input nobody reads, to read it: of the key that has the fewest being read, its oldest.

    Args:
        connection: of a transaction that writes.
        worker: who reads it.
        depot: where it reads and writes; jobs whose files lie in another are left to others.
        fetched: whether its input is read from a URL, or lies here.
        most: inputs of one key that this worker reads at a time.
        now: the moment.
        until: how long the worker has it.
    """
    waiting, others = jobs.alias(), jobs.alias()

    def of_kind(url: ColumnElement[Any]) -> ColumnElement[bool]:
        return url.is_not(None) if fetched else url.is_(None)

    held = (
        select(func.count())
        .where(others.c.key_id == waiting.c.key_id, others.c.state == "queued", others.c.lease_until >= now)
        .correlate(waiting)
    )
    held_here = held.where(others.c.worker == worker, of_kind(others.c.url)).scalar_subquery()
    free = or_(waiting.c.lease_until.is_(None), waiting.c.lease_until < now)
    next_one = (
        select(waiting.c.id)
        .where(
            waiting.c.state == "queued",
            lies_in(depot, waiting.c.depot),
            free,
            of_kind(waiting.c.url),
            held_here < most,
        )
        .order_by(held.scalar_subquery(), waiting.c.created_at, waiting.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = await connection.execute(
        jobs.update()
        .where(jobs.c.id == next_one.scalar_subquery())
        .values(worker=worker, lease_until=until)
        .returning(*jobs.c)
    )
    found = row.one_or_none()
    return None if found is None else job_of(found)


async def divide(
    connection: AsyncConnection,
    job_id: str,
    worker: str,
    *,
    model: str,
    n_bytes: int,
    spans: Sequence[Span],
    now: datetime,
    input_name: str | None = None,
) -> bool:
    """Let a job run, its input read and divided; False where it is no longer this worker's."""
    mine = (jobs.c.id == job_id) & (jobs.c.worker == worker) & (jobs.c.state == "queued")
    n_lines = sum(span.n_lines for span in spans)
    taken = await connection.execute(
        jobs.update()
        .where(mine)
        .values(
            state="running",
            model=model,
            input_name=input_name,
            n_bytes=n_bytes,
            n_lines=n_lines,
            started_at=now,
            lease_until=None,
        )
        .returning(jobs.c.id)
    )
    if taken.one_or_none() is None:
        return False
    await _add_chunks(connection, job_id, spans)
    return True


async def take(
    connection: AsyncConnection, worker: str, depot: str, models: Collection[str], *, now: datetime, until: datetime
) -> tuple[Job, Chunk] | None:
    """Take the next chunk: of the key that has the fewest at work, of its oldest job, the first that nobody holds.

    Jobs whose files lie in another depot, or that run another model, are left to others.

    Where the key has a balance a job's chunks are taken one after the other, so that what it pays for is a beginning.
    """
    free = chunks.c.done_at.is_(None) & or_(chunks.c.lease_until.is_(None), chunks.c.lease_until < now)
    waiting = (
        select(jobs.c.id, jobs.c.key_id)
        .where(
            jobs.c.state == "running",
            jobs.c.model.in_(models),
            lies_in(depot, jobs.c.depot),
            or_(jobs.c.not_before.is_(None), jobs.c.not_before <= now),
            select(chunks.c.id).where(chunks.c.job_id == jobs.c.id, free).exists(),
        )
        .order_by(jobs.c.created_at, jobs.c.id)
    )
    found = (await connection.execute(waiting)).all()
    if not found:
        return None
    at_work = await _at_work(connection, now)
    in_order = await keys.counted(connection, {key_id for _, key_id in found})
    for job_id, key_id in sorted(found, key=lambda row: at_work.get(row.key_id, 0)):  # the sort keeps the older first
        first = (
            select(chunks.c.id)
            .where(chunks.c.job_id == job_id, free)
            .order_by(chunks.c.first_line)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        if key_id in in_order:
            left = select(func.min(chunks.c.first_line)).where(chunks.c.job_id == job_id, chunks.c.done_at.is_(None))
            first = first.where(chunks.c.first_line == left.scalar_subquery())
        row = await connection.execute(
            chunks.update()
            .where(chunks.c.id == first.scalar_subquery())
            .values(worker=worker, lease_until=until, n_tries=chunks.c.n_tries + 1)
            .returning(*chunks.c)
        )
        if (taken := row.one_or_none()) and (job := await get(connection, job_id)):
            span = Span(start=taken.start, n_bytes=taken.n_bytes, first_line=taken.first_line, n_lines=taken.n_lines)
            return job, Chunk(id=taken.id, job_id=job.id, span=span, n_tries=taken.n_tries, n_admitted=taken.n_admitted)
    return None


async def beat(
    connection: AsyncConnection, worker: str, chunk_ids: Collection[int], job_ids: Collection[str], *, until: datetime
) -> set[int | str]:
    """Renew a worker's leases on chunks and on jobs whose input it reads.

    Returns:
        The ids of those that it still holds; jobs that have ended are not among them, nor their chunks.
    """
    reading = await connection.execute(
        jobs.update()
        .where(jobs.c.worker == worker, jobs.c.state == "queued", jobs.c.id.in_(job_ids))
        .values(lease_until=until)
        .returning(jobs.c.id)
    )
    running = select(jobs.c.id).where(jobs.c.state == "running")
    held = await connection.execute(
        chunks.update()
        .where(
            chunks.c.worker == worker,
            chunks.c.id.in_(chunk_ids),
            chunks.c.done_at.is_(None),
            chunks.c.job_id.in_(running),
        )
        .values(lease_until=until)
        .returning(chunks.c.id)
    )
    return {*reading.scalars(), *held.scalars()}


async def release(connection: AsyncConnection, worker: str) -> None:
    """Let go of everything that a worker holds."""
    free = {"worker": None, "lease_until": None}
    await connection.execute(jobs.update().where(jobs.c.worker == worker, jobs.c.state == "queued").values(free))
    await connection.execute(
        chunks.update()
        .where(chunks.c.worker == worker, chunks.c.done_at.is_(None))
        .values(**free, n_tries=chunks.c.n_tries - 1)
    )


async def holds(connection: AsyncConnection, chunk: Chunk, worker: str) -> bool:
    """Whether a chunk is a worker's still, which stays so until the transaction's end."""
    await hold(connection, chunk.job_id)
    return (await connection.execute(select(chunks.c.id).where(_mine(chunk, worker)))).one_or_none() is not None


async def put_off(connection: AsyncConnection, chunk: Chunk, worker: str, *, n_admitted: int, until: datetime) -> None:
    """Let go of a chunk whose job has to wait, and of nothing where it is no longer this worker's.

    Args:
        connection: of a transaction that writes.
        chunk: what is let go.
        worker: whose it was.
        n_admitted: tokens that the key's minute has given for it.
        until: no chunk of its job is taken before.
    """
    await hold(connection, chunk.job_id)
    row = await connection.execute(
        chunks.update()
        .where(_mine(chunk, worker))
        .values(worker=None, lease_until=None, n_tries=chunks.c.n_tries - 1, n_admitted=n_admitted)
        .returning(chunks.c.id)
    )
    if row.one_or_none() is not None:
        await connection.execute(jobs.update().where(jobs.c.id == chunk.job_id).values(not_before=until))


async def split(connection: AsyncConnection, chunk: Chunk, worker: str, spans: Sequence[Span]) -> None:
    """Put smaller chunks in a chunk's place, each as one over which a worker has died already.

    Nothing changes where the chunk is no longer this worker's, or its job no longer runs.
    """
    if await hold(connection, chunk.job_id) != "running":
        return
    gone = await connection.execute(chunks.delete().where(_mine(chunk, worker)).returning(chunks.c.id))
    if gone.one_or_none() is not None:
        await _add_chunks(connection, chunk.job_id, spans, n_tries=1)


async def finish(
    connection: AsyncConnection,
    chunk: Chunk,
    worker: str,
    written: Written,
    *,
    now: datetime,
    failure: str | None = None,
) -> bool:
    """Name a chunk's files and count its lines; its job is completed where this was the last.

    Args:
        connection: of a transaction that writes.
        chunk: what has become files.
        worker: whose it is.
        written: the files.
        now: the moment.
        failure: why the job fails with this chunk, whose lines are then not all there.

    Returns:
        False where the chunk is no longer this worker's or its job no longer runs; nothing is then changed.
    """
    # Also makes workers that finish the job's last chunks wait for each other.
    if await hold(connection, chunk.job_id) != "running":
        return False
    named = await connection.execute(
        chunks.update()
        .where(_mine(chunk, worker))
        .values(
            done_at=now,
            lease_until=None,
            output=written.output,
            n_output_bytes=written.n_output_bytes,
            errors=written.errors,
            n_error_bytes=written.n_error_bytes,
        )
        .returning(chunks.c.id)
    )
    if named.one_or_none() is None:
        return False
    await connection.execute(
        jobs.update()
        .where(jobs.c.id == chunk.job_id)
        .values(
            n_completed=jobs.c.n_completed + written.n_completed,
            n_failed=jobs.c.n_failed + written.n_failed,
            n_tokens=jobs.c.n_tokens + written.n_tokens,
            n_written_bytes=jobs.c.n_written_bytes + written.n_output_bytes + written.n_error_bytes,
        )
    )
    left = select(chunks.c.id).where(chunks.c.job_id == chunk.job_id, chunks.c.done_at.is_(None)).limit(1)
    if failure is not None:
        await end(connection, chunk.job_id, "failed", now=now, error=failure)
    elif (await connection.execute(left)).one_or_none() is None:
        await end(connection, chunk.job_id, "completed", now=now)
    return True


async def _add_chunks(connection: AsyncConnection, job_id: str, spans: Sequence[Span], *, n_tries: int = 0) -> None:
    none_yet = {"n_tries": n_tries, "n_admitted": 0, "n_output_bytes": 0, "n_error_bytes": 0}
    await connection.execute(chunks.insert(), [{"job_id": job_id, **asdict(span), **none_yet} for span in spans])


def _mine(chunk: Chunk, worker: str) -> ColumnElement[bool]:
    return (chunks.c.id == chunk.id) & (chunks.c.worker == worker) & chunks.c.done_at.is_(None)


async def _at_work(connection: AsyncConnection, now: datetime) -> Mapping[str, int]:
    statement = (
        select(jobs.c.key_id, func.count())
        .join(chunks, chunks.c.job_id == jobs.c.id)
        .where(chunks.c.done_at.is_(None), chunks.c.lease_until >= now)
        .group_by(jobs.c.key_id)
    )
    return {row.key_id: row[1] for row in await connection.execute(statement)}
