"""`/v1/files`: uploads for batch jobs, and the files that jobs made, as OpenAI's clients handle them."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from fundament.api.auth import owner
from fundament.api.body import echo
from fundament.api.ids import FORM, checked_id
from fundament.api.jobs import check_stored, download, find, job_of_result, send
from fundament.api.multipart import read_form
from fundament.api.schemas import responses, streamed
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.depot import of_upload
from fundament.errors import BusyError, Fault, InputError, NotFoundError
from fundament.store import files, jobs
from fundament.store.files import File
from fundament.store.jobs import Job

router = APIRouter(tags=["Files"])

_PURPOSE = "batch"


@router.post(
    "/v1/files",
    summary="Upload a file",
    responses=responses("FileObject", errors=(401, 403, 413, 415, 429, 500, 503)),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {
                            "file": {"type": "string", "format": "binary", "description": "JSONL."},
                            "purpose": {"type": "string", "default": _PURPOSE},
                        },
                    }
                }
            },
        }
    },
)
async def upload(request: Request) -> Response:
    """Keep a file until it is deleted."""
    state, key_id, file_id = state_of(request), owner(request), files.new_id()
    max_bytes = int(state.settings.max_job_mb * 1e6)
    form = await read_form(request, state.depot, of_upload(file_id), fields=["purpose"], max_bytes=max_bytes)
    try:
        if (purpose := form.fields.get("purpose", _PURPOSE)) != _PURPOSE:
            raise InputError(Fault("body -> purpose", f"Input should be '{_PURPOSE}'.", "enum", echo(purpose)))
        file = File(
            id=file_id,
            key_id=key_id,
            name=form.file_name[-255:],
            purpose=_PURPOSE,
            n_bytes=form.n_bytes,
            created_at=datetime.now(UTC),
            expires_at=None,
        )
        async with state.store.write() as connection:
            await check_stored(state, connection, key_id, file.n_bytes)
            await files.create(connection, file)
    except BaseException:
        await state.depot.remove(of_upload(file_id))
        raise
    return answer(_describe(file))


@router.get(
    "/v1/files", summary="List files", responses=responses("FileList", errors=(401, 403, 429, 500, 503), fields=True)
)
async def recent(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    after: Annotated[str | None, Query(pattern=FORM)] = None,
    purpose: Annotated[str | None, Query(pattern=FORM)] = None,
) -> Response:
    """The caller's uploads, the newest first."""
    async with state_of(request).store.read() as connection:
        found = await files.recent(connection, owner(request), limit=limit + 1, purpose=purpose, after=after)
    return answer(page([_describe(file) for file in found], limit))


@router.get(
    "/v1/files/{file_id}",
    summary="Get a file",
    responses=responses("FileObject", errors=(401, 403, 404, 429, 500, 503)),
)
async def get(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    state, key_id = state_of(request), owner(request)
    if made := job_of_result(file_id):
        job, kind = await find(state, made[0], key_id, "openai", "files"), made[1]
        async with state.store.read() as connection:
            parts = await jobs.parts(connection, job.id, kind)
        return answer(_describe_result(job, file_id, sum(part.n_bytes for part in parts)))
    return answer(_describe(await find_file(state, file_id, key_id)))


@router.get(
    "/v1/files/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses=streamed("application/octet-stream", errors=(401, 403, 404, 409, 429, 500, 503)),
)
async def content(request: Request, file_id: str) -> Response:
    """The file's bytes."""
    state, key_id = state_of(request), owner(request)
    if made := job_of_result(file_id):
        return await download(state, await find(state, made[0], key_id, "openai", "files"), made[1])
    file = await find_file(state, file_id, key_id)
    return await send(
        state.depot,
        [of_upload(file.id)],
        n_bytes=file.n_bytes,
        media_type="application/octet-stream",
        file_name=file.name,
    )


@router.delete(
    "/v1/files/{file_id}",
    summary="Delete a file",
    responses=responses("FileDeleted", errors=(401, 403, 404, 409, 429, 500, 503)),
)
async def delete(request: Request, file_id: str) -> Response:
    """Remove an upload; jobs that were made from it go on."""
    state, key_id = state_of(request), owner(request)
    if job_of_result(file_id):
        raise BusyError("A job's files stay until the job expires.")
    async with state.store.write() as connection:
        gone = await files.delete(connection, checked_id(file_id, _not_found), key_id)
    if not gone:
        raise _not_found(file_id)
    await state.depot.remove(of_upload(file_id))
    return answer({"id": file_id, "object": "file", "deleted": True})


async def find_file(state: State, file_id: str, key_id: str) -> File:
    """A caller's own upload.

    Raises:
        NotFoundError: there is none, or it is somebody else's.
    """
    async with state.store.read() as connection:
        file = await files.get(connection, checked_id(file_id, _not_found), key_id)
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
        await state.depot.copy(of_upload(file.id), name)
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


def _not_found(file_id: str) -> NotFoundError:
    return NotFoundError(f"File '{echo(file_id)}' not found or access denied")


def _describe(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.n_bytes,
        "created_at": int(file.created_at.timestamp()),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _describe_result(job: Job, file_id: str, n_bytes: int) -> dict[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": n_bytes,
        "created_at": int((job.ended_at or job.created_at).timestamp()),
        "expires_at": int(job.expires_at.timestamp()),
        "filename": f"{file_id}.jsonl",
        "purpose": "batch_output",
        "status": "processed",
    }
