"""`/v1/bulk-embeddings`: the older form of batch jobs, a CSV or JSONL file in a form."""

import re
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from fundament.api.auth import owner
from fundament.api.body import echo
from fundament.api.jobs.downloads import gone, is_here
from fundament.api.jobs.multipart import read_form
from fundament.api.jobs.queue import base_url, find, submit
from fundament.api.jobs.signatures import signed_url
from fundament.api.schemas import OF_ONE, OF_STATE, OrAbsent, form_body, responses
from fundament.api.state import state_of
from fundament.api.wire import answer, iso
from fundament.depot import of_upload
from fundament.errors import BusyError, Fault, InputError
from fundament.store import files, jobs
from fundament.store.jobs import Job

router = APIRouter(tags=["Bulk Embeddings"])

_STATES = {"queued": "waiting", "running": "in-progress", "completed": "completed"}
_EMAIL = r"^[^@ \x00]+@[^@ \x00]+$"
_FORM = {
    "type": "object",
    "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "CSV with a column of texts, or JSONL."},
        "model": {"type": "string", "minLength": 1},
        "email": {
            "type": "string",
            "pattern": _EMAIL,
            "maxLength": 320,
            "description": "Kept and given back; nothing is sent there.",
        },
    },
}


class BulkEmbeddingJobResponse(BaseModel):
    """A job of the older form."""

    id: str
    job_id: str = Field(alias="_id")
    status: str
    user_id: str
    user_email: OrAbsent[str] = None
    file_name: str
    model_name: str
    used_token_count: int
    created_at: str
    completed_at: OrAbsent[str] = None
    error: OrAbsent[str] = None


class DownloadResultResponse(BaseModel):
    """Where the result is."""

    id: str
    download_url: str


def describe(job: Job) -> dict[str, Any]:
    """A job in the older form."""
    ended = job.state == "completed"
    error = job.error or (None if ended or job.state in jobs.ACTIVE else f"The job is {job.state}.")
    told = {
        "_id": job.id,
        "id": job.id,
        "status": _STATES.get(job.state, "failed"),
        "user_id": job.key_id,
        "user_email": job.asked.get("email"),
        "file_name": job.asked.get("file_name"),
        "model_name": job.asked["model"],
        "used_token_count": job.n_tokens,
        "created_at": iso(job.created_at),
        "completed_at": job.ended_at and iso(job.ended_at),
        "error": error,
    }
    return {name: value for name, value in told.items() if value is not None}


@router.post(
    "/v1/bulk-embeddings",
    summary="Start a bulk embedding job",
    responses=responses(BulkEmbeddingJobResponse, errors=(400, 401, 403, 413, 415, 429, 500, 503)),
    openapi_extra=form_body(_FORM),
)
async def create(request: Request) -> Response:
    """Queue a file's lines."""
    state, key_id = state_of(request), owner(request)
    upload = of_upload(files.new_id())
    max_bytes = int(state.settings.max_job_mb * 1e6)
    form = await read_form(request, state.depot, upload, fields=["model", "email"], max_bytes=max_bytes)
    try:
        if not (model := form.fields.get("model")):
            raise InputError(Fault("body -> model", "Field required", "missing"))
        email = form.fields.get("email")
        if email is not None and (len(email) > 320 or not re.fullmatch(_EMAIL, email)):
            raise InputError(Fault("body -> email", "Input should be an address.", "value_error", echo(email)))
        spec = state.find_embedder(model)

        async def place(name: str) -> int:
            await state.depot.copy(upload, name)
            return form.n_bytes

        job = await submit(
            state,
            "bulk",
            key_id=key_id,
            model=spec.id,
            asked={
                "model": state.answering(model),
                "line": {"task": task} if (task := state.task_of_alias(model)) else {},
                "email": email,
                "file_name": form.file_name[-255:],
                "csv": form.file_name.lower().endswith(".csv"),
                "base_url": base_url(state, request),
            },
            place=place,
        )
    finally:
        await state.depot.remove(upload)
    return answer(describe(job))


@router.get(
    "/v1/bulk-embeddings/{job_id}",
    summary="Get a bulk embedding job",
    responses=responses(BulkEmbeddingJobResponse, errors=OF_ONE),
)
async def status(request: Request, job_id: str) -> Response:
    """How far a job is."""
    state = state_of(request)
    return answer(describe(await find(state, job_id, owner(request), "bulk")))


@router.post(
    "/v1/bulk-embeddings/{job_id}/download-result",
    summary="Get a link to the result",
    responses=responses(DownloadResultResponse, errors=OF_STATE),
)
async def result(request: Request, job_id: str) -> Response:
    """A link that works without a key until the job expires."""
    state = state_of(request)
    job = await find(state, job_id, owner(request), "bulk")
    if job.state != "completed":
        raise BusyError(f"Job '{job_id}' is not completed, so it has no result.")
    if not await is_here(state, job):
        raise gone(f"{job_id}-output.jsonl")
    return answer({"id": job.id, "download_url": await signed_url(state, job, "output")})
