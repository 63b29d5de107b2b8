"""Batch jobs as every dialect has them: handed in, found, ended, described, downloaded."""

import base64
import hmac
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Literal, get_args
from urllib.parse import quote

from fastapi import Request
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import StreamingResponse

from fundament.api.body import echo
from fundament.api.ids import checked_id
from fundament.api.state import State
from fundament.buckets import is_listed
from fundament.depot import INPUT, Depot, identity, of_job, secret
from fundament.errors import (
    BodyError,
    BusyError,
    Fault,
    FetchError,
    InputError,
    LimitError,
    NotFoundError,
    UnavailableError,
)
from fundament.fetching import check_form
from fundament.store import files, jobs
from fundament.store.jobs import Dialect, Job

Kind = Literal["output", "errors"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_JSON_LINES = "application/jsonl"
_SECONDS = re.compile("[0-9]{1,12}")  # since 1970, to the year 33658


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
        InputError: a URL that is none.
        LimitError: the key has as many jobs as it may.
        BodyError: the key's inputs and files take as many bytes as they may.
        UnavailableError: the disk is full, or the bucket does not answer.
    """
    if url is not None and not is_listed(url, state.settings.input_buckets):
        if url.startswith(("s3://", "gs://")):
            message = "It is no object of a bucket that may be read here: the operator lists those in input_buckets."
            raise InputError(Fault("body -> input_url", message, "url", echo(url)))
        _check_url("input_url", url)
    if webhook_url is not None:
        _check_url("webhook_url", webhook_url)
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
                    asked=asked,
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


def _check_url(field: str, url: str) -> None:
    try:
        check_form(url)
    except FetchError as error:
        raise InputError(Fault(f"body -> {field}", error.detail, "url", echo(url))) from error


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
    """Stop a job that waits or runs; what it wrote is kept.

    Raises:
        BusyError: it has ended already.
    """
    async with state.store.write() as connection:
        ended = await jobs.end(connection, job.id, "cancelled", now=datetime.now(UTC))
    if ended is None:
        raise BusyError(f"Batch job '{job.id}' has ended already, so it cannot be cancelled.")
    state.wake()
    return ended


async def download(state: State, job: Job, kind: Kind, *, media_type: str = _JSON_LINES) -> StreamingResponse:
    """A job's output or its errors, chunk after chunk.

    Raises:
        BusyError: the job still waits or runs.
        NotFoundError: its files have expired, or were deleted.
        UnavailableError: the depot does not answer.
    """
    if job.state in jobs.ACTIVE:
        raise BusyError(f"Batch job '{job.id}' has not ended yet; its {kind} can be downloaded then.")
    if job.state == "expired":
        raise NotFoundError(f"Batch job '{job.id}' expired at {_iso(job.expires_at)}; its files are gone.")
    async with state.store.read() as connection:
        parts = await jobs.parts(connection, job.id, kind)
    if not parts and (job.n_completed if kind == "output" else job.n_failed):
        raise NotFoundError(f"The {kind} of batch job '{job.id}' was deleted.")
    return await send(
        state.depot,
        [of_job(job.id, part.name) for part in parts],
        n_bytes=sum(part.n_bytes for part in parts),
        media_type=media_type,
        file_name=f"{job.id}-{kind}.jsonl",
    )


async def send(
    depot: Depot, names: Sequence[str], *, n_bytes: int, media_type: str, file_name: str
) -> StreamingResponse:
    """Files one after the other, as one download.

    Its first piece is read before the answer begins: what is not there, or does not answer, is then said in words.

    Raises:
        NotFoundError: the first file is gone.
        UnavailableError: the depot does not answer.
    """
    pieces = _joined(depot, names)
    try:
        first = await anext(pieces, b"")
    except FileNotFoundError as error:
        raise gone(file_name) from error

    async def all_of_them() -> AsyncIterator[bytes]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    encoded = quote(file_name, safe="")
    named = f'filename="{file_name}"' if encoded == file_name else f"filename*=utf-8''{encoded}"
    headers = {"Content-Length": str(n_bytes), "Content-Disposition": f"attachment; {named}"}
    return StreamingResponse(all_of_them(), media_type=media_type, headers=headers)


def gone(name: str) -> NotFoundError:
    """Why a file whose row is there has no bytes here."""
    return NotFoundError(
        f"The bytes of '{echo(name)}' are not here: they are gone, or on another machine that shares this one's store "
        "but not its files_url."
    )


async def _joined(depot: Depot, names: Sequence[str]) -> AsyncGenerator[bytes, None]:
    for name in names:
        async for piece in depot.read(name):
            yield piece


async def signed_url(state: State, job: Job, kind: Kind) -> str:
    """An address that gives a job's files without a key, until the job expires."""
    expires = int(job.expires_at.timestamp())
    signature = await _signature(state, job.id, kind, expires)
    return f"{job.asked.get('base_url', '')}/v1/batch/{job.id}/{kind}?expires={expires}&signature={signature}"


async def is_signed(state: State, request: Request, job_id: str, kind: Kind) -> bool:
    """Whether a request carries our signature for these files, and in time."""
    expires, given = request.query_params.get("expires", ""), request.query_params.get("signature", "")
    if not _SECONDS.fullmatch(expires) or int(expires) < datetime.now(UTC).timestamp():
        return False
    return hmac.compare_digest(given.encode(), (await _signature(state, job_id, kind, int(expires))).encode())


async def _signature(state: State, job_id: str, kind: Kind, expires: int) -> str:
    return hmac.digest(await secret(state.depot, "links"), f"{job_id}/{kind}/{expires}".encode(), sha256).hex()


async def message_secret(state: State) -> bytes:
    """What signs webhooks."""
    if given := state.settings.webhook_secret:
        return base64.b64decode(given.removeprefix("whsec_"))
    return await secret(state.depot, "webhook")


async def describe(state: State, job: Job) -> dict[str, Any]:
    """A job in the form in which it was asked for."""
    if job.dialect in ("batch", "files"):
        return (_batch if job.dialect == "batch" else _files)(job, await _links(state, job))
    return (_openai if job.dialect == "openai" else _bulk)(job)


_BATCH_STATES = {"queued": "pending", "running": "processing"}
_FILES_STATES = {"queued": "validating", "running": "in_progress", "expired": "failed"}
_OPENAI_STATES = {"queued": "validating", "running": "in_progress"}
_BULK_STATES = {"queued": "waiting", "running": "in-progress", "completed": "completed"}


def _batch(job: Job, links: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "batch_id": job.id,
        "status": _BATCH_STATES.get(job.state, job.state),
        "model": job.asked["model"],
        "created_at": _iso(job.created_at),
        "completed_at": job.ended_at and _iso(job.ended_at),
        "expires_at": _iso(job.expires_at),
        **links,
        "error": job.error,
        "stats": None
        if job.n_lines is None
        else {
            "total": job.n_lines,
            "completed": job.n_completed,
            "failed": job.n_failed,
            "total_tokens": job.n_tokens,
        },
        **_webhook(job),
    }


def _files(job: Job, links: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": _FILES_STATES.get(job.state, job.state),
        "created_at": int(job.created_at.timestamp()),
        "endpoint": job.asked.get("endpoint"),
        "request_counts": _counts(job),
        "usage": {"total_tokens": job.n_tokens, "prompt_tokens": job.n_tokens},
        "model": job.asked["model"],
        "input_file_id": job.asked.get("input_file_id"),
        "completion_window": job.asked.get("completion_window"),
        "completed_at": job.ended_at and int(job.ended_at.timestamp()),
        "expires_at": int(job.expires_at.timestamp()),
        **links,
        "error": "The job has expired." if job.state == "expired" else job.error,
        **_webhook(job),
    }


def _openai(job: Job) -> dict[str, Any]:
    ended = job.ended_at and int(job.ended_at.timestamp())
    errors = [{"code": "invalid_input", "message": job.error, "param": None, "line": None}]
    here = _has_files(job)
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.asked.get("endpoint"),
        "model": job.model,
        "errors": {"object": "list", "data": errors} if job.error else None,
        "input_file_id": job.asked.get("input_file_id"),
        "completion_window": job.asked.get("completion_window"),
        "status": _OPENAI_STATES.get(job.state, job.state),
        "output_file_id": result_id(job, "output") if here and job.n_completed else None,
        "error_file_id": result_id(job, "errors") if here and job.n_failed else None,
        "created_at": int(job.created_at.timestamp()),
        "in_progress_at": job.started_at and int(job.started_at.timestamp()),
        "expires_at": int(job.expires_at.timestamp()),
        "finalizing_at": ended if job.state == "completed" else None,
        "completed_at": ended if job.state == "completed" else None,
        "failed_at": ended if job.state == "failed" else None,
        "expired_at": int(job.expires_at.timestamp()) if job.state == "expired" else None,
        "cancelling_at": ended if job.state == "cancelled" else None,
        "cancelled_at": ended if job.state == "cancelled" else None,
        "request_counts": _counts(job),
        "usage": {
            "input_tokens": job.n_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.n_tokens,
        },
        "metadata": job.asked.get("metadata"),
    }


def _bulk(job: Job) -> dict[str, Any]:
    ended = job.state == "completed"
    error = job.error or (None if ended or job.state in jobs.ACTIVE else f"The job is {job.state}.")
    told = {
        "_id": job.id,
        "id": job.id,
        "status": _BULK_STATES.get(job.state, "failed"),
        "user_id": job.key_id,
        "user_email": job.asked.get("email"),
        "file_name": job.asked.get("file_name"),
        "model_name": job.asked["model"],
        "used_token_count": job.n_tokens,
        "created_at": _iso(job.created_at),
        "completed_at": job.ended_at and _iso(job.ended_at),
        "error": error,
    }
    return {name: value for name, value in told.items() if value is not None}


def result_id(job: Job, kind: Kind) -> str:
    """The id under which OpenAI's clients download a job's files."""
    return f"{job.id.replace('batch_', 'file-', 1)}-{kind}"


def job_of_result(file_id: str) -> tuple[str, Kind] | None:
    """The job, and which of its files, that such an id means."""
    stem, _, given = file_id.rpartition("-")
    for kind in KINDS:
        if kind == given and stem.startswith("file-"):
            return stem.replace("file-", "batch_", 1), kind
    return None


def _has_files(job: Job) -> bool:
    return job.state not in (*jobs.ACTIVE, "expired")


async def _links(state: State, job: Job) -> dict[str, str | None]:
    here = _has_files(job) and job.depot in (None, await identity(state.depot))  # whose secret signs
    return {
        "output_url": await signed_url(state, job, "output") if here and job.n_completed else None,
        "error_file_url": await signed_url(state, job, "errors") if here and job.n_failed else None,
    }


def _counts(job: Job) -> dict[str, int]:
    return {"total": job.n_lines or 0, "completed": job.n_completed, "failed": job.n_failed}


def _webhook(job: Job) -> dict[str, Any]:
    if job.webhook_url is None:
        return {}
    return {
        "webhook": {
            "url": job.webhook_url,
            "state": job.webhook_state,
            "attempts": job.webhook_attempts,
            "next_attempt_at": job.webhook_at and _iso(job.webhook_at) if job.webhook_state == "pending" else None,
            "error": job.webhook_error,
        }
    }


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
