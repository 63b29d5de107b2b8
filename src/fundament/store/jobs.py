"""The tables `jobs` and `job_chunks`: work that is handed in once and fetched when it is done.

A job's input is divided into chunks of consecutive lines. What workers take and hold of it is in `leases`.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    case,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy import Row as SqlRow
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.schema import Instant, Whole, Words, known, metadata, page, slices, take_turns

State = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
ACTIVE: Sequence[State] = ("queued", "running")
Called = Literal["pending", "delivered", "failed"]
Dialect = Literal["batch", "files", "openai", "bulk"]

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("key_id", String(12), nullable=False),
    Column("depot", String(16)),
    Column("dialect", String(8), nullable=False),
    Column("state", String(12), nullable=False, index=True),
    Column("outcome", String(12)),
    Column("model", String(256)),
    Column("asked", JSON, nullable=False),
    Column("url", Text),
    Column("n_bytes", BigInteger, nullable=False),
    Column("n_written_bytes", BigInteger, nullable=False),
    Column("n_lines", Integer),
    Column("n_completed", Integer, nullable=False),
    Column("n_failed", Integer, nullable=False),
    Column("n_tokens", BigInteger, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("started_at", Instant),
    Column("ended_at", Instant),
    Column("expires_at", Instant, nullable=False),
    Column("error", Words),
    Column("worker", String(40)),
    Column("lease_until", Instant),
    Column("not_before", Instant),
    Column("input_name", String(80)),
    Column("webhook_url", Text),
    Column("webhook_state", String(12)),
    Column("webhook_attempts", Integer, nullable=False),
    Column("webhook_at", Instant),
    Column("webhook_error", Words),
    Index(None, "key_id", "created_at"),
)

chunks = Table(
    "job_chunks",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("job_id", String(40), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("n_bytes", BigInteger, nullable=False),
    Column("first_line", Integer, nullable=False),
    Column("n_lines", Integer, nullable=False),
    Column("worker", String(40)),
    Column("lease_until", Instant),
    Column("n_tries", Integer, nullable=False),
    Column("n_admitted", BigInteger, nullable=False),
    Column("done_at", Instant),
    Column("output", String(80)),
    Column("n_output_bytes", BigInteger, nullable=False),
    Column("errors", String(80)),
    Column("n_error_bytes", BigInteger, nullable=False),
    Index(None, "job_id", "first_line", unique=True),
    Index(None, "worker", "done_at"),
)


_PARTS = {
    "output": (chunks.c.output, chunks.c.n_output_bytes),
    "errors": (chunks.c.errors, chunks.c.n_error_bytes),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the store knows it.

    Attributes:
        id: names it.
        key_id: whose it is; empty for callers without a key.
        depot: where its files lie; None for jobs of a release that did not note it.
        dialect: the form in which it was asked for and is answered.
        outcome: the state in which it ended, which stays when it expires; None where it has not ended, or only expired.
        model: the id of the model that runs it; None until the input has been read, where only that names one.
        asked: what the caller said, for the lines and for the answer.
        url: where the input is to be read from; None where it is here.
        n_bytes: of the input.
        n_written_bytes: of its output and its errors.
        n_lines: None until the input has been read.
        n_completed: lines that became vectors.
        n_failed: lines that did not.
        error: why it failed.
        not_before: until when its chunks stay where they are; None where they need not wait.
        input_name: the file with its lines; None where it is the one that was handed in.
        webhook_state: `waiting` for the job's end, `pending`, `delivered` or `failed`; None without a webhook.
        webhook_at: when it is tried next.
    """

    id: str
    key_id: str
    depot: str | None
    dialect: Dialect
    state: State
    outcome: State | None
    model: str | None
    asked: Mapping[str, Any]
    url: str | None
    n_bytes: int
    n_written_bytes: int
    n_lines: int | None
    n_completed: int
    n_failed: int
    n_tokens: int
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime
    error: str | None
    worker: str | None
    lease_until: datetime | None
    not_before: datetime | None
    input_name: str | None
    webhook_url: str | None
    webhook_state: str | None
    webhook_attempts: int
    webhook_at: datetime | None
    webhook_error: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a job and its size."""

    name: str
    n_bytes: int


def new_id() -> str:
    """A job's id, which nobody can guess."""
    return f"batch_{secrets.token_hex(12)}"


async def create(
    connection: AsyncConnection,
    job_id: str,
    *,
    key_id: str,
    depot: str,
    dialect: Dialect,
    model: str | None,
    asked: Mapping[str, Any],
    n_bytes: int,
    now: datetime,
    expires_at: datetime,
    url: str | None = None,
    webhook_url: str | None = None,
) -> Job:
    """Queue a job whose input is in its place, or is read from `url`."""
    row = await connection.execute(
        jobs.insert()
        .values(
            id=job_id,
            key_id=key_id,
            depot=depot,
            dialect=dialect,
            state="queued",
            model=model,
            asked=dict(asked),
            url=url,
            n_bytes=n_bytes,
            n_written_bytes=0,
            n_completed=0,
            n_failed=0,
            n_tokens=0,
            created_at=now,
            expires_at=expires_at,
            webhook_url=webhook_url,
            webhook_state="waiting" if webhook_url else None,
            webhook_attempts=0,
        )
        .returning(*jobs.c)
    )
    return job_of(row.one())


async def get(connection: AsyncConnection, job_id: str, key_id: str | None = None) -> Job | None:
    """One job; with `key_id` only where it is that key's."""
    statement = select(jobs).where(jobs.c.id == job_id)
    if key_id is not None:
        statement = statement.where(jobs.c.key_id == key_id)
    row = (await connection.execute(statement)).one_or_none()
    return None if row is None else job_of(row)


async def recent(
    connection: AsyncConnection,
    key_id: str,
    dialects: Sequence[Dialect],
    *,
    limit: int,
    beyond: tuple[datetime, str] | None = None,
    oldest_first: bool = False,
) -> Sequence[Job]:
    """A page of a key's jobs: those that come after a moment and an id, see `page`."""
    mine = select(jobs).where(jobs.c.key_id == key_id, jobs.c.dialect.in_(dialects))
    statement = page(mine, jobs.c.created_at, jobs.c.id, limit=limit, beyond=beyond, oldest_first=oldest_first)
    return [job_of(row) for row in await connection.execute(statement)]


async def results(
    connection: AsyncConnection,
    key_id: str,
    dialects: Sequence[Dialect],
    kind: Literal["output", "errors"],
    *,
    limit: int,
    beyond: tuple[datetime, str] | None = None,
    oldest_first: bool = False,
) -> Sequence[tuple[Job, int]]:
    """A page of a key's jobs that have ended with an output, or with errors, and the bytes of these.

    They come in the order of their end and of the files' names, `result_id`; see `page`.
    """
    _, size = _PARTS[kind]
    of_job = chunks.c.job_id == jobs.c.id
    total = select(func.sum(size)).where(of_job).scalar_subquery()
    made = select(jobs, total.label("n_made")).where(
        jobs.c.key_id == key_id,
        jobs.c.dialect.in_(dialects),
        jobs.c.outcome.is_not(None),
        jobs.c.state != "expired",
        select(chunks.c.id).where(of_job, size > 0).exists(),
    )
    name = func.replace(jobs.c.id, "batch_", "file-") + f"-{kind}"
    statement = page(made, jobs.c.ended_at, name, limit=limit, beyond=beyond, oldest_first=oldest_first)
    found = []
    for row in await connection.execute(statement):
        fields = dict(row._mapping)
        n_bytes = int(fields.pop("n_made"))
        found.append((Job(**fields), n_bytes))
    return found


def result_id(job_id: str, kind: Literal["output", "errors"]) -> str:
    """What a job's output, or its errors, are called among files."""
    return f"{job_id.replace('batch_', 'file-')}-{kind}"


async def active(connection: AsyncConnection, key_id: str) -> tuple[int, int]:
    """How many of a key's jobs wait or run, and the bytes of all that have not expired, inputs and results.

    Who asks the same of that key waits until this transaction ends: what is allowed by it is counted by the next.
    """
    await take_turns(connection, f"jobs of {key_id}")
    mine = select(jobs).where(jobs.c.key_id == key_id).subquery()
    count = select(func.count()).where(mine.c.state.in_(ACTIVE))
    total = func.sum(mine.c.n_bytes + mine.c.n_written_bytes)
    n_bytes = select(func.coalesce(total, 0)).where(mine.c.state != "expired")
    return (await connection.execute(count)).scalar_one(), int((await connection.execute(n_bytes)).scalar_one())


async def end(
    connection: AsyncConnection, job_id: str, state: State, *, now: datetime, error: str | None = None
) -> Job | None:
    """End a job that waits or runs; its webhook is due at once. None where it has ended already."""
    row = await connection.execute(
        jobs.update()
        .where(jobs.c.id == job_id, jobs.c.state.in_(ACTIVE))
        .values(
            state=state,
            outcome=state,
            error=error,
            ended_at=now,
            lease_until=None,
            **_due(now),
        )
        .returning(*jobs.c)
    )
    found = row.one_or_none()
    return None if found is None else job_of(found)


def _due(now: datetime) -> Mapping[str, ColumnElement[Any]]:
    """What becomes of the webhook of a job that ends, if it has one."""
    waits = jobs.c.webhook_state == "waiting"
    return {
        "webhook_state": case((waits, "pending"), else_=jobs.c.webhook_state),
        "webhook_at": case((waits, literal(now, Instant)), else_=jobs.c.webhook_at),
    }


async def parts(connection: AsyncConnection, job_id: str, kind: Literal["output", "errors"]) -> Sequence[Part]:
    """The files that hold a job's output or its errors, in the order of the input."""
    name, size = _PARTS[kind]
    statement = select(name, size).where(chunks.c.job_id == job_id, name.is_not(None)).order_by(chunks.c.first_line)
    return [Part(*row) for row in await connection.execute(statement)]


async def hold(connection: AsyncConnection, job_id: str) -> State | None:
    """A job's state, which nobody else changes before the transaction's end; None where there is no such job.

    Who changes a job and its chunks holds the job first, so that no two transactions wait for each other.
    """
    state: State | None = (
        await connection.execute(select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True))
    ).scalar()
    return state


async def drop_parts(connection: AsyncConnection, job_id: str, kind: Literal["output", "errors"]) -> Sequence[str]:
    """Forget a job's output or its errors; the names of the files, which are to be removed."""
    await hold(connection, job_id)
    name, size = _PARTS[kind]
    gone = await parts(connection, job_id, kind)
    await connection.execute(chunks.update().where(chunks.c.job_id == job_id).values({name: None, size: 0}))
    n_bytes = jobs.c.n_written_bytes - sum(part.n_bytes for part in gone)
    await connection.execute(jobs.update().where(jobs.c.id == job_id).values(n_written_bytes=n_bytes))
    return [part.name for part in gone]


async def expire(connection: AsyncConnection, *, now: datetime) -> Sequence[str]:
    """End every job whose time is over, its webhook due where it was not; their ids, whose files are to be removed."""
    over = await connection.execute(
        jobs.update()
        .where(jobs.c.expires_at <= now, jobs.c.state != "expired")
        .values(
            state="expired",
            ended_at=func.coalesce(jobs.c.ended_at, jobs.c.expires_at),
            lease_until=None,
            **_due(now),
        )
        .returning(jobs.c.id)
    )
    ids = list(over.scalars())
    for some in slices(ids):
        await connection.execute(chunks.delete().where(chunks.c.job_id.in_(some)))
    return ids


async def kept(connection: AsyncConnection, ids: Collection[str]) -> set[str]:
    """Which of these are jobs that have files."""
    return await known(connection, jobs.c.id, ids, jobs.c.state != "expired")


async def backlog(connection: AsyncConnection) -> Mapping[State, tuple[int, int]]:
    """How many jobs wait or run, in each of these states, and their lines that are known and have not run."""
    left = func.sum(func.coalesce(jobs.c.n_lines, 0) - jobs.c.n_completed - jobs.c.n_failed)
    found = await connection.execute(
        select(jobs.c.state, func.count(), left).where(jobs.c.state.in_(ACTIVE)).group_by(jobs.c.state)
    )
    return dict.fromkeys(ACTIVE, (0, 0)) | {row[0]: (row[1], int(row[2])) for row in found}


async def elsewhere(connection: AsyncConnection, depot: str) -> int:
    """How many jobs wait or run whose files lie in another depot."""
    count = select(func.count()).select_from(jobs).where(jobs.c.state.in_(ACTIVE), jobs.c.depot != depot)
    return int((await connection.execute(count)).scalar_one())


async def forget(connection: AsyncConnection, *, before: datetime) -> None:
    """Remove jobs that expired long ago."""
    await connection.execute(jobs.delete().where(jobs.c.state == "expired", jobs.c.expires_at < before))


async def call(
    connection: AsyncConnection,
    depot: str,
    delays: Sequence[timedelta],
    *,
    now: datetime,
    but_for: Collection[str] = (),
) -> Job | None:
    """Take a job whose webhook is due, and put its next try off by the delay that follows this one.

    Args:
        connection: of a transaction that writes.
        depot: whose secrets sign; jobs whose files lie in another are left to others.
        delays: after each try.
        now: the moment.
        but_for: keys whose jobs' turn it is not.
    """
    due = (
        select(jobs.c.id, jobs.c.webhook_attempts)
        .where(
            jobs.c.webhook_state == "pending",
            jobs.c.webhook_at <= now,
            jobs.c.key_id.not_in(but_for),
            lies_in(depot, jobs.c.depot),
        )
        .order_by(jobs.c.webhook_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    found = (await connection.execute(due)).one_or_none()
    if found is None:
        return None
    later = now + delays[min(found.webhook_attempts, len(delays) - 1)]
    row = await connection.execute(
        jobs.update()
        .where(jobs.c.id == found.id)
        .values(webhook_attempts=jobs.c.webhook_attempts + 1, webhook_at=later)
        .returning(*jobs.c)
    )
    return job_of(row.one())


async def called(connection: AsyncConnection, job_id: str, state: Called, error: str | None) -> None:
    """Note how a webhook's try ended; one that was taken by its receiver stays so, whatever another try heard."""
    tried = jobs.update().where(jobs.c.id == job_id, jobs.c.webhook_state == "pending")
    await connection.execute(tried.values(webhook_state=state, webhook_error=error))


def lies_in(depot: str, noted: ColumnElement[Any]) -> ColumnElement[bool]:
    """Whether a job's files lie in a depot, by what the job noted; one that noted none is anybody's."""
    return or_(noted.is_(None), noted == depot)


def job_of(row: SqlRow[Any]) -> Job:
    """A row of the table as the job that it is."""
    return Job(**row._mapping)
