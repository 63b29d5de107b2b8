"""What jobs wrote, and uploads, as downloads."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Literal, get_args
from urllib.parse import quote

from starlette.responses import StreamingResponse

from fundament.api.body import echo
from fundament.api.state import State
from fundament.api.wire import iso
from fundament.depot import Depot, identity, of_job
from fundament.errors import BusyError, NotFoundError
from fundament.store import jobs
from fundament.store.jobs import Job

Kind = Literal["output", "errors"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_JSON_LINES = "application/jsonl"


def has_files(job: Job) -> bool:
    """Whether what a job wrote may be there: it has ended, and has not expired."""
    return job.state not in (*jobs.ACTIVE, "expired")


async def is_here(state: State, job: Job) -> bool:
    """Whether this machine has a job's files, and signs links to them."""
    return job.depot in (None, await identity(state.depot))


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
        raise NotFoundError(f"Batch job '{job.id}' expired at {iso(job.expires_at)}; its files are gone.")
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
