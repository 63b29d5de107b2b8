"""`/v1/batches` in OpenAI's shape: jobs made from an uploaded file, whose lines name their model."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field

from fundament.api.auth import owner
from fundament.api.body import Body, Kept, read_body
from fundament.api.jobs.downloads import has_files
from fundament.api.jobs.files import link, page
from fundament.api.jobs.lines import model_named
from fundament.api.jobs.queue import base_url, cancel, find, submit
from fundament.api.schemas import OF_ONE, OF_STATE, request_body, responses
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.depot import of_upload
from fundament.errors import FundamentError
from fundament.store import jobs
from fundament.store.jobs import Job

router = APIRouter(tags=["Batches"])

_STATES = {"queued": "validating", "running": "in_progress"}
_MOST_METADATA = 16
_HEAD_BYTES = 1_000_000  # of an upload, among which its first line is looked for


def _few(value: Any) -> Any:
    """Refuse too many pairs before any is looked at."""
    if isinstance(value, dict) and len(value) > _MOST_METADATA:
        raise ValueError(f"It should have at most {_MOST_METADATA} pairs, not {len(value)}.")
    return value


class BatchesRequest(Body):
    """Fields of OpenAI's batches."""

    input_file_id: Annotated[Kept, Field(min_length=1, max_length=256)]
    endpoint: Literal["/v1/embeddings"]
    completion_window: Literal["24h"] = "24h"
    output_expires_after: None = Field(None, description="Not served: results stay as long as the operator says.")
    metadata: (
        Annotated[
            dict[Annotated[Kept, Field(max_length=64)], Annotated[Kept, Field(max_length=512)]],
            Field(max_length=_MOST_METADATA),
            BeforeValidator(_few),
        ]
        | None
    ) = None


class RequestCounts(BaseModel):
    """Lines of a job."""

    total: int
    completed: int
    failed: int


class CachedTokens(BaseModel):
    """Tokens read that were kept from before: none are."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """Tokens written before an answer: none are."""

    reasoning_tokens: int


class BatchUsage(BaseModel):
    """Tokens of a job so far."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class OpenAIBatch(BaseModel):
    """A job made by OpenAI's clients; moments are in seconds."""

    id: str
    object: str
    endpoint: str
    model: str | None
    errors: dict[str, Any] | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None


class OpenAIBatchPage(BaseModel):
    """A page of jobs, the newest first."""

    object: str
    data: list[OpenAIBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def describe(job: Job) -> dict[str, Any]:
    """A job as OpenAI's clients read it."""
    ended = job.ended_at and int(job.ended_at.timestamp())
    errors = [{"code": "invalid_input", "message": job.error, "param": None, "line": None}]
    here = has_files(job)
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.asked.get("endpoint"),
        "model": job.model,
        "errors": {"object": "list", "data": errors} if job.error else None,
        "input_file_id": job.asked.get("input_file_id"),
        "completion_window": job.asked.get("completion_window"),
        "status": _STATES.get(job.state, job.state),
        "output_file_id": jobs.result_id(job.id, "output") if here and job.n_completed else None,
        "error_file_id": jobs.result_id(job.id, "errors") if here and job.n_failed else None,
        "created_at": int(job.created_at.timestamp()),
        "in_progress_at": job.started_at and int(job.started_at.timestamp()),
        "expires_at": int(job.expires_at.timestamp()),
        "finalizing_at": ended if job.state == "completed" else None,
        "completed_at": ended if job.state == "completed" else None,
        "failed_at": ended if job.state == "failed" else None,
        "expired_at": int(job.expires_at.timestamp()) if job.state == "expired" else None,
        "cancelling_at": ended if job.state == "cancelled" else None,
        "cancelled_at": ended if job.state == "cancelled" else None,
        "request_counts": counts(job),
        "usage": {
            "input_tokens": job.n_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.n_tokens,
        },
        "metadata": job.asked.get("metadata"),
    }


def counts(job: Job) -> dict[str, int]:
    """How far a job's lines are."""
    return {"total": job.n_lines or 0, "completed": job.n_completed, "failed": job.n_failed}


@router.post(
    "/v1/batches",
    summary="Create a batch",
    openapi_extra=request_body(BatchesRequest),
    responses=responses(OpenAIBatch, errors=(401, 403, 404, 413, 415, 429, 500, 503)),
)
async def create(request: Request) -> Response:
    """Queue the lines of an uploaded file."""
    state, key_id, asked = state_of(request), owner(request), await read_body(request, BatchesRequest)
    place = await link(state, asked.input_file_id, key_id)
    job = await submit(
        state,
        "openai",
        key_id=key_id,
        model=await _model(state, asked.input_file_id),
        asked={**asked.model_dump(), "base_url": base_url(state, request)},
        place=place,
    )
    return answer(describe(job))


@router.get(
    "/v1/batches/{batch_id}",
    summary="Get a batch",
    responses=responses(OpenAIBatch, errors=OF_ONE),
)
async def status(request: Request, batch_id: str) -> Response:
    """How far a batch is."""
    state = state_of(request)
    return answer(describe(await find(state, batch_id, owner(request), "openai")))


@router.post(
    "/v1/batches/{batch_id}/cancel",
    summary="Cancel a batch",
    responses=responses(OpenAIBatch, errors=OF_STATE),
)
async def stop(request: Request, batch_id: str) -> Response:
    """Stop a batch that waits or runs; lines that are done stay."""
    state = state_of(request)
    job = await find(state, batch_id, owner(request), "openai")
    return answer(describe(await cancel(state, job)))


async def _model(state: State, file_id: str) -> str | None:
    """The model that an upload's first line names, so that only a worker that serves it takes the job.

    None where it names none that is served here; whoever reads the lines then says so.
    """
    try:
        head = await state.depot.read_part(of_upload(file_id), start=0, n_bytes=_HEAD_BYTES)
        return state.find(model_named(head.lstrip().partition(b"\n")[0])).id
    except (FundamentError, OSError):
        return None


async def list_batches(state: State, key_id: str, limit: int, after: str | None, *, oldest_first: bool) -> Response:
    """A page of a key's batches.

    Raises:
        NotFoundError: `after` is none of them.
    """
    beyond = None
    if after is not None:
        last = await find(state, after, key_id, "openai")
        beyond = last.created_at, last.id
    async with state.store.read() as connection:
        found = await jobs.recent(
            connection, key_id, ["openai"], limit=limit + 1, beyond=beyond, oldest_first=oldest_first
        )
    return answer(page([describe(job) for job in found], limit))
