"""`/v1/files`: uploads for batch jobs, and the files that jobs made, as OpenAI's clients handle them."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from fundament.api.auth import owner
from fundament.api.body import echo
from fundament.api.ids import FORM, checked_id
from fundament.api.jobs.downloads import KINDS, Kind, download, gone, send
from fundament.api.jobs.multipart import read_form
from fundament.api.jobs.queue import check_stored, find
from fundament.api.schemas import OF_MANY, OF_ONE, OF_STATE, OrAbsent, form_body, responses, streamed
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.depot import of_job, of_upload
from fundament.errors import BusyError, Fault, InputError, NotFoundError
from fundament.store import files, jobs
from fundament.store.files import File
from fundament.store.jobs import Dialect, Job

router = APIRouter(tags=["Files"])

_PURPOSE, _MADE = "batch", "batch_output"
_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
_DIALECTS: tuple[Dialect, ...] = ("openai", "files")
_ANY_BYTES = "application/octet-stream"
_LEAST_SECONDS, _MOST_SECONDS = 3600, 2_592_000  # that `expires_after` may say, as OpenAI has it

_Place = tuple[datetime, str]
"""Where a file stands among a key's others: when it was made, then its id."""

_FORM = {
    "type": "object",
    "required": ["file"],
    "dependentRequired": {
        "expires_after[anchor]": ["expires_after[seconds]"],
        "expires_after[seconds]": ["expires_after[anchor]"],
    },
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSONL."},
        "purpose": {"type": "string", "default": _PURPOSE},
        "expires_after[anchor]": {"type": "string", "const": "created_at"},
        "expires_after[seconds]": {
            "type": "integer",
            "minimum": _LEAST_SECONDS,
            "maximum": _MOST_SECONDS,
            "description": "Without it the file stays until it is deleted.",
        },
    },
}


class FileObject(BaseModel):
    """An upload, or a file that a job made."""

    id: str
    object: str
    bytes: int
    created_at: int
    expires_at: OrAbsent[int] = None
    filename: str
    purpose: str
    status: str


class FileList(BaseModel):
    """A page of uploads and of files that jobs made."""

    object: str
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: str
    deleted: bool


@router.post(
    "/v1/files",
    summary="Upload a file",
    responses=responses(FileObject, errors=(401, 403, 413, 415, 429, 500, 503)),
    openapi_extra=form_body(_FORM),
)
async def upload(request: Request) -> Response:
    """Keep a file until it is deleted, or as long as `expires_after` says."""
    state, key_id, file_id = state_of(request), owner(request), files.new_id()
    max_bytes = int(state.settings.max_job_mb * 1e6)
    form = await read_form(request, state.depot, of_upload(file_id), fields=_FIELDS, max_bytes=max_bytes)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(state.depot.remove, of_upload(file_id))
        if (purpose := form.fields.get("purpose", _PURPOSE)) != _PURPOSE:
            raise InputError(Fault("body -> purpose", f"Input should be '{_PURPOSE}'.", "enum", echo(purpose)))
        now = datetime.now(UTC)
        file = File(
            id=file_id,
            key_id=key_id,
            name=form.file_name[-255:],
            purpose=_PURPOSE,
            n_bytes=form.n_bytes,
            created_at=now,
            expires_at=_expiry(form.fields, now),
        )
        async with state.store.write() as connection:
            await check_stored(state, connection, key_id, file.n_bytes)
            await files.create(connection, file)
            undo.pop_all()  # see `submit`
    return answer(describe(file))


@router.get("/v1/files", summary="List files", responses=responses(FileList, errors=OF_MANY, fields=True))
async def recent(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: Annotated[str | None, Query(pattern=FORM)] = None,
    purpose: Annotated[str | None, Query(pattern=FORM)] = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The caller's uploads (`batch`) and the files that jobs made (`batch_output`), the newest first."""
    state, key_id, oldest_first = state_of(request), owner(request), order == "asc"
    beyond = None if after is None else await _place_of(state, after, key_id)
    found: list[tuple[_Place, dict[str, Any]]] = []
    which: dict[str, Any] = {"limit": limit + 1, "beyond": beyond, "oldest_first": oldest_first}
    async with state.store.read() as connection:
        if purpose in (None, _PURPOSE):
            uploads = await files.recent(connection, key_id, **which)
            found += [((file.created_at, file.id), describe(file)) for file in uploads]
        for kind in KINDS if purpose in (None, _MADE) else ():
            for job, n_bytes in await jobs.results(connection, key_id, _DIALECTS, kind, **which):
                file_id = jobs.result_id(job.id, kind)
                found.append(((_written_at(job), file_id), _describe_result(job, file_id, n_bytes)))
    found.sort(key=lambda each: each[0], reverse=not oldest_first)
    return answer(page([described for _, described in found], limit))


@router.get(
    "/v1/files/{file_id}",
    summary="Get a file",
    responses=responses(FileObject, errors=OF_ONE),
)
async def get(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    state, key_id = state_of(request), owner(request)
    if result := await _result(state, file_id, key_id):
        job, kind = result
        async with state.store.read() as connection:
            parts = await jobs.parts(connection, job.id, kind)
        if not parts:
            raise _not_found(file_id)
        return answer(_describe_result(job, file_id, sum(part.n_bytes for part in parts)))
    return answer(describe(await find_file(state, file_id, key_id)))


@router.get(
    "/v1/files/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses=streamed(_ANY_BYTES),
)
async def content(request: Request, file_id: str) -> Response:
    """The file's bytes."""
    state, key_id = state_of(request), owner(request)
    if result := await _result(state, file_id, key_id):
        return await download(state, *result, media_type=_ANY_BYTES)
    file = await find_file(state, file_id, key_id)
    return await send(
        state.depot,
        [of_upload(file.id)],
        n_bytes=file.n_bytes,
        media_type=_ANY_BYTES,
        file_name=file.name,
    )


@router.delete(
    "/v1/files/{file_id}",
    summary="Delete a file",
    responses=responses(FileDeleted, errors=OF_STATE),
)
async def delete(request: Request, file_id: str) -> Response:
    """Remove an upload, and jobs that were made from it go on; or a file that a job made, once it has ended."""
    state, key_id = state_of(request), owner(request)
    if result := await _result(state, file_id, key_id):
        job, kind = result
        if job.state in jobs.ACTIVE:
            raise BusyError(f"Batch job '{job.id}' still writes this file; cancel the job first.")
        async with state.store.write() as connection:
            names = await jobs.drop_parts(connection, job.id, kind)
        if not names:
            raise _not_found(file_id)
        for name in names:
            await state.depot.remove(of_job(job.id, name))
    else:
        await remove(state, file_id, key_id)
    return answer({"id": file_id, "object": "file", "deleted": True})


async def remove(state: State, file_id: str, key_id: str | None) -> None:
    """Remove an upload of a key, or of whom it may be where that is None.

    Raises:
        NotFoundError: there is none.
    """
    async with state.store.write() as connection:
        gone = await files.delete(connection, checked_id(file_id, _not_found), key_id)
    if not gone:
        raise _not_found(file_id)
    await state.depot.remove(of_upload(file_id))


async def find_file(state: State, file_id: str, key_id: str) -> File:
    """A caller's own upload.

    Raises:
        NotFoundError: there is none, or it is somebody else's.
    """
    async with state.store.read() as connection:
        file = await files.get(connection, checked_id(file_id, _not_found), key_id, now=datetime.now(UTC))
    if file is None:
        raise _not_found(file_id)
    return file


async def link(state: State, file_id: str, key_id: str) -> Callable[[str], Awaitable[int]]:
    """What makes an upload the input of a job, which then keeps it even where the upload is deleted.

    Raises:
        NotFoundError: there is no such upload.
    """
    file = await find_file(state, file_id, key_id)

    async def place(name: str) -> int:
        try:
            await state.depot.copy(of_upload(file.id), name)
        except FileNotFoundError as error:
            raise gone(file.name) from error
        return file.n_bytes

    return place


def page(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list as OpenAI's clients read it, made from one row more than is asked for."""
    shown = rows[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(rows) > limit,
    }


async def _place_of(state: State, file_id: str, key_id: str) -> _Place:
    if result := await _result(state, file_id, key_id):
        job, _ = result
        return _written_at(job), file_id
    return (await find_file(state, file_id, key_id)).created_at, file_id


def _expiry(fields: Mapping[str, str], now: datetime) -> datetime | None:
    """When a form's file goes; None where it stays.

    Raises:
        InputError: an `expires_after` that is none.
    """
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InputError(
            Fault("body -> expires_after -> anchor", "Input should be 'created_at'.", "enum", echo(anchor))
        )
    given = int(seconds) if seconds and seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else 0
    if not _LEAST_SECONDS <= given <= _MOST_SECONDS:
        message = f"Input should be a whole number from {_LEAST_SECONDS} to {_MOST_SECONDS}."
        raise InputError(Fault("body -> expires_after -> seconds", message, "value_error", echo(seconds)))
    return now + timedelta(seconds=given)


async def _result(state: State, file_id: str, key_id: str) -> tuple[Job, Kind] | None:
    """A caller's job, and which of its files, that such an id means; None where it is an upload's.

    Raises:
        NotFoundError: there is no such file.
    """
    stem, _, given = file_id.rpartition("-")
    for kind in KINDS:
        if kind == given and stem.startswith("file-"):
            try:
                return await find(state, stem.replace("file-", "batch_", 1), key_id, *_DIALECTS), kind
            except NotFoundError:
                raise _not_found(file_id) from None
    return None


def _not_found(file_id: str) -> NotFoundError:
    return NotFoundError(f"File '{echo(file_id)}' not found or access denied")


def describe(file: File) -> dict[str, Any]:
    """An upload as answers have it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.n_bytes,
        "created_at": int(file.created_at.timestamp()),
        **({"expires_at": int(file.expires_at.timestamp())} if file.expires_at else {}),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _describe_result(job: Job, file_id: str, n_bytes: int) -> dict[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": n_bytes,
        "created_at": int(_written_at(job).timestamp()),
        "expires_at": int(job.expires_at.timestamp()),
        "filename": f"{file_id}.jsonl",
        "purpose": _MADE,
        "status": "processed",
    }


def _written_at(job: Job) -> datetime:
    return job.ended_at or job.created_at
