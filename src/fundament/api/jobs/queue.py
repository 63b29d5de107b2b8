"""Jobs as every dialect has them: handed in, found, ended."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.api.body import echo
from fundament.api.ids import checked_id
from fundament.api.state import State
from fundament.depot import INPUT, identity, of_job
from fundament.errors import (
    BodyError,
    BusyError,
    LimitError,
    NotFoundError,
    UnavailableError,
)
from fundament.store import files, jobs
from fundament.store.jobs import Dialect, Job


def base_url(state: State, request: Request) -> str:
    """Where the caller reaches this server."""
    return (state.settings.public_url or str(request.base_url)).rstrip("/")


async def submit(
    state: State,
    dialect: Dialect,
    *,
    key_id: str,
    model: str | None,
    asked: Mapping[str, Any],
    place: Callable[[str], Awaitable[int]] | None = None,
    url: str | None = None,
    webhook_url: str | None = None,
) -> Job:
    """Queue a job.

    Args:
        state: the application's parts.
        dialect: the form in which it is answered.
        key_id: whose it is.
        model: the id of the model that runs it; None where its first line names it.
        asked: `model` as the caller named it, `line` with the fields that every line has in common, and what the
            dialect repeats in its answers.
        place: brings the input to a name in the depot, and says its size in bytes.
        url: where the input is instead.
        webhook_url: told when the job ends.

    Raises:
        LimitError: the key has as many jobs as it may.
        BodyError: the key's inputs and files take as many bytes as they may.
        UnavailableError: the disk is full, or the bucket does not answer.
    """
    job_id, now = jobs.new_id(), datetime.now(UTC)
    try:
        async with AsyncExitStack() as undo:
            undo.push_async_callback(state.depot.remove, of_job(job_id))
            here = await identity(state.depot)
            n_bytes = await place(of_job(job_id, INPUT)) if place is not None else 0
            async with state.store.write() as connection:
                _check_number(state, await check_stored(state, connection, key_id, n_bytes))
                job = await jobs.create(
                    connection,
                    job_id,
                    key_id=key_id,
                    depot=here,
                    dialect=dialect,
                    model=model,
                    asked={"truncate": state.settings.truncate, **asked},  # a worker may have other settings
                    n_bytes=n_bytes,
                    now=now,
                    expires_at=now + timedelta(hours=state.settings.job_hours),
                    url=url,
                    webhook_url=webhook_url,
                )
                undo.pop_all()  # the store may keep it though its answer is lost; bytes without a row are swept
    except OSError as error:
        raise UnavailableError(f"The input cannot be kept: {error.strerror}.", retry_after_seconds=60) from error
    state.wake()
    return job


def _check_number(state: State, n_active: int) -> None:
    if n_active >= (most := state.settings.max_jobs_per_key):
        raise LimitError(
            "RATE_CONCURRENCY_LIMIT_EXCEEDED",
            f"{n_active} batch jobs wait or run, of {most} that may. Wait for one to end, or cancel one.",
            retry_after_seconds=60,
        )


async def check_stored(state: State, connection: AsyncConnection, key_id: str, n_more: int) -> int:
    """Refuse more bytes than a key may keep here; others that ask this of the key wait for the transaction's end.

    Args:
        state: the application's parts.
        connection: of the transaction that notes them.
        key_id: whose they are.
        n_more: bytes that come to what is noted already.

    Returns:
        How many of the key's jobs wait or run.

    Raises:
        BodyError: 413, with the way out.
    """
    n_active, n_bytes = await jobs.active(connection, key_id)
    n_bytes += await files.stored_bytes(connection, key_id) + n_more
    if n_bytes > (most := state.settings.max_stored_mb_per_key * 1e6):
        raise BodyError(
            413,
            f"Your files and jobs would take {n_bytes / 1e6:.1f} MB of {most / 1e6:g} MB. Delete files, or wait "
            "until older jobs expire.",
        )
    return n_active


async def find(state: State, job_id: str, key_id: str, *dialects: Dialect) -> Job:
    """A caller's own job, as it stands.

    Raises:
        NotFoundError: there is none, or it is somebody else's, or was asked for in another form.
    """
    async with state.store.read() as connection:
        job = await jobs.get(connection, checked_id(job_id, _not_found), key_id)
    if job is None or job.dialect not in dialects:
        raise _not_found(job_id)
    return job


def _not_found(job_id: str) -> NotFoundError:
    return NotFoundError(f"Batch job '{echo(job_id)}' not found or access denied")


async def cancel(state: State, job: Job) -> Job:
    """Stop a job that waits or runs; what it wrote is kept. One that is cancelled already stays so.

    Raises:
        BusyError: it has ended otherwise.
    """
    async with state.store.write() as connection:
        ended = await jobs.end(connection, job.id, "cancelled", now=datetime.now(UTC))
        stands = ended or await jobs.get(connection, job.id)
    if stands is None or stands.state != "cancelled":
        raise BusyError(f"Batch job '{job.id}' has ended already, so it cannot be cancelled.", is_final=True)
    state.wake()
    return stands
