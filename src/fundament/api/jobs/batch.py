"""`/v1/batch`: embeddings of many lines, handed in once and fetched when they are done.

A job made from `input` or `input_url` is answered as the Search Foundation API does; one made from an uploaded file
(`input_file_id`) as its files variant does, with 202 and states of its own.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field, RootModel

from fundament.api.answers import EmbeddingUsage
from fundament.api.auth import is_link, owner
from fundament.api.body import Kept, echo, read_body
from fundament.api.embeddings import EmbeddingsRequest, as_named, check
from fundament.api.ids import FORM
from fundament.api.inputs import check_some
from fundament.api.jobs.batches import OpenAIBatchPage, RequestCounts, counts, list_batches
from fundament.api.jobs.downloads import Kind, download, has_files, is_here
from fundament.api.jobs.files import link
from fundament.api.jobs.lines import ENDPOINT, documents_side
from fundament.api.jobs.queue import base_url, cancel, find, submit
from fundament.api.jobs.signatures import is_signed, signed_url
from fundament.api.schemas import OF_MANY, OF_ONE, OF_STATE, OrAbsent, request_body, responses, streamed
from fundament.api.state import State, state_of
from fundament.api.wire import answer, can_write, iso
from fundament.buckets import is_listed
from fundament.depot import on_thread
from fundament.errors import Fault, FetchError, InputError, NotFoundError
from fundament.fetching import check_form
from fundament.jsonl import jsonl
from fundament.store import jobs
from fundament.store.jobs import Dialect, Job

router = APIRouter(tags=["Batch Embeddings"])

_DIALECTS: tuple[Dialect, ...] = ("batch", "files")
_BATCH_STATES = {"queued": "pending", "running": "processing"}
_FILES_STATES = {"queued": "validating", "running": "in_progress", "expired": "failed"}
_OTHER = {"model", "input", "input_url", "webhook_url", "input_file_id", "endpoint", "completion_window"}


class BatchRequest(EmbeddingsRequest):
    """One of `input`, `input_url` and `input_file_id`; the other fields hold for every line that does not say them."""

    input: Annotated[list[dict[str, Any] | str], Field(fail_fast=True)] | None = Field(  # type: ignore[assignment]
        None,
        description='Lines: `{"custom_id": "1", "body": {"input": "…"}}`, `{"input": "…"}`, or the text itself.',
        examples=[[{"custom_id": "1", "body": {"input": "Hello world"}}]],
    )
    input_url: Kept | None = Field(None, max_length=8192, description="Where a JSONL file of such lines is.")
    input_file_id: Kept | None = Field(None, max_length=256, description="An uploaded JSONL file: `POST /v1/files`.")
    webhook_url: Kept | None = Field(None, max_length=8192, description="Told when the job ends.")
    endpoint: Literal["/v1/embeddings"] | None = Field(None, description="The only one.")
    completion_window: Literal["24h"] | None = Field(None, description="The only one.")


class BatchStats(BaseModel):
    """Lines of a job."""

    total: int
    completed: int
    failed: int
    total_tokens: int


class Webhook(BaseModel):
    """How telling the caller's server goes."""

    url: str
    state: str
    attempts: int
    next_attempt_at: str | None
    error: str | None


class BatchStatus(BaseModel):
    """A job made from `input` or `input_url`; moments are in UTC, ISO 8601."""

    batch_id: str
    status: str
    model: str
    created_at: str
    completed_at: str | None
    expires_at: str
    output_url: str | None
    error_file_url: str | None
    error: str | None
    stats: BatchStats | None
    webhook: OrAbsent[Webhook] = None


class BatchJob(BaseModel):
    """A job made from `input_file_id`; moments are in seconds."""

    id: str
    status: str
    created_at: int
    endpoint: str
    request_counts: RequestCounts
    usage: EmbeddingUsage
    model: str
    input_file_id: str
    completion_window: str
    completed_at: int | None
    expires_at: int
    output_url: str | None
    error_file_url: str | None
    error: str | None
    webhook: OrAbsent[Webhook] = None


class BatchAnswer(RootModel[BatchStatus | BatchJob]):
    """A job in the form in which it was asked for."""


class BatchList(RootModel[list[BatchStatus] | OpenAIBatchPage]):
    """Jobs, the newest first; OpenAI's clients get a page of theirs."""


async def describe(state: State, job: Job) -> dict[str, Any]:
    """A job in the form in which it was asked for."""
    return (_files if job.dialect == "files" else _batch)(job, await _links(state, job))


def _batch(job: Job, links: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "batch_id": job.id,
        "status": _BATCH_STATES.get(job.state, job.state),
        "model": job.asked["model"],
        "created_at": iso(job.created_at),
        "completed_at": job.ended_at and iso(job.ended_at),
        "expires_at": iso(job.expires_at),
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
        "request_counts": counts(job),
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


async def _links(state: State, job: Job) -> dict[str, str | None]:
    here = has_files(job) and await is_here(state, job)
    return {
        "output_url": await signed_url(state, job, "output") if here and job.n_completed else None,
        "error_file_url": await signed_url(state, job, "errors") if here and job.n_failed else None,
    }


def _webhook(job: Job) -> dict[str, Any]:
    if job.webhook_url is None:
        return {}
    return {
        "webhook": {
            "url": job.webhook_url,
            "state": job.webhook_state,
            "attempts": job.webhook_attempts,
            "next_attempt_at": job.webhook_at and iso(job.webhook_at) if job.webhook_state == "pending" else None,
            "error": job.webhook_error,
        }
    }


@router.post(
    "/v1/batch/embeddings",
    summary="Create a batch embedding job",
    openapi_extra=request_body(BatchRequest),
    responses=responses(BatchStatus, errors=(400, 401, 403, 404, 413, 415, 429, 500, 503))
    | {202: {"model": BatchJob, "description": "The same of an uploaded file (`input_file_id`)."}},
)
async def create(request: Request) -> Response:
    """Queue lines; the answer names the job."""
    state, asked = state_of(request), await read_body(request, BatchRequest)
    job = await create_job(state, asked, key_id=owner(request), base=base_url(state, request))
    return answer(await describe(state, job), status=202 if job.dialect == "files" else 200)


async def create_job(state: State, asked: BatchRequest, *, key_id: str, base: str) -> Job:
    """Check what can be checked before the lines are read, and queue the job.

    Raises:
        FundamentError: a model that is not served, a field that it does not take, or more than may be queued.
    """
    spec = state.find_embedder(asked.model)
    asked = documents_side(spec, as_named(state, asked))  # a worker may have other aliases
    check(state, spec, asked)
    sources = [name for name in ("input", "input_url", "input_file_id") if getattr(asked, name) is not None]
    if len(sources) != 1:
        message = "Give exactly one of input, input_url and input_file_id."
        raise InputError(Fault(f"body -> {sources[1] if sources else 'input'}", message, "value_error"))
    told: dict[str, Any] = {
        "model": state.answering(asked.model),
        "line": asked.model_dump(mode="json", exclude=_OTHER, exclude_unset=True, exclude_none=True),
        "base_url": base,
    }
    if asked.input_file_id is not None:
        told |= {
            "input_file_id": asked.input_file_id,
            "endpoint": asked.endpoint or ENDPOINT,
            "completion_window": asked.completion_window or "24h",
        }
    place = await _placing(state, asked, key_id)
    _check_urls(state, asked)
    return await submit(
        state,
        "batch" if asked.input_file_id is None else "files",
        key_id=key_id,
        model=spec.id,
        asked=told,
        place=place,
        url=asked.input_url,
        webhook_url=asked.webhook_url,
    )


async def _placing(state: State, asked: BatchRequest, key_id: str) -> Callable[[str], Awaitable[int]] | None:
    """What brings the lines to their place; None where the worker fetches them."""
    if asked.input_file_id is not None:
        return await link(state, asked.input_file_id, key_id)
    if asked.input is None:
        return None
    lines = asked.input
    check_some(lines)
    if len(lines) > (most := state.settings.max_inline_lines):
        message = f"List should have at most {most} items, not {len(lines)}. Use input_url or input_file_id for more."
        raise InputError(Fault("body -> input", message, "too_long", echo(lines)))

    async def write(name: str) -> int:
        try:
            return await state.depot.write(name, on_thread(jsonl(lines)))
        except orjson.JSONEncodeError:
            place = next(place for place, line in enumerate(lines) if not can_write(line))
            message = "It is nested too deeply to be kept."
            raise InputError(Fault(f"body -> input -> {place}", message, "value_error")) from None

    return write


def _check_urls(state: State, asked: BatchRequest) -> None:
    """Refuse URLs that are none.

    Raises:
        InputError: naming the field.
    """
    if (url := asked.input_url) is not None and not is_listed(url, state.settings.input_buckets):
        if url.startswith(("s3://", "gs://")):
            message = "It is no object of a bucket that may be read here: the operator lists those in input_buckets."
            raise InputError(Fault("body -> input_url", message, "url", echo(url)))
        _check_url("input_url", url)
    if asked.webhook_url is not None:
        _check_url("webhook_url", asked.webhook_url)


def _check_url(field: str, url: str) -> None:
    try:
        check_form(url)
    except FetchError as error:
        raise InputError(Fault(f"body -> {field}", error.detail, "url", echo(url))) from error


@router.get(
    "/v1/batch/{batch_id}",
    summary="Get batch job status",
    responses=responses(BatchAnswer, errors=OF_ONE),
)
async def status(request: Request, batch_id: str) -> Response:
    """How far a job is."""
    state = state_of(request)
    return answer(await describe(state, await find(state, batch_id, owner(request), *_DIALECTS)))


@router.delete(
    "/v1/batch/{batch_id}",
    summary="Cancel a batch job",
    responses=responses(BatchAnswer, errors=OF_STATE),
)
async def stop(request: Request, batch_id: str) -> Response:
    """Stop a job that waits or runs; lines that are done stay."""
    state = state_of(request)
    job = await find(state, batch_id, owner(request), *_DIALECTS)
    return answer(await describe(state, await cancel(state, job)))


@router.get(
    "/v1/batches",
    summary="List batch jobs",
    responses=responses(BatchList, errors=OF_MANY, fields=True),
)
async def recent(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(pattern=FORM)] = None,
    order: Annotated[Literal["asc", "desc"] | None, Query()] = None,
) -> Response:
    """The caller's jobs but OpenAI's batches, the newest first, all in one form.

    A page of OpenAI's batches is what OpenAI's clients get, and who asks for `after` or `order`.
    """
    state, key_id = state_of(request), owner(request)
    if after is not None or order is not None or "x-stainless-lang" in request.headers:
        return await list_batches(state, key_id, limit, after, oldest_first=order == "asc")
    async with state.store.read() as connection:
        found = await jobs.recent(connection, key_id, _DIALECTS, limit=limit)
    return answer([await describe(state, replace(job, dialect="batch")) for job in found])


@router.get(
    "/v1/batch/{batch_id}/output",
    summary="Download batch job output",
    response_class=Response,
    responses=streamed("application/jsonl"),
)
async def output(request: Request, batch_id: str) -> Response:
    """The vectors: JSONL, a line for each line that has one, in the order of the input."""
    return await _download(request, batch_id, "output")


@router.get(
    "/v1/batch/{batch_id}/errors",
    summary="Download batch job error file",
    response_class=Response,
    responses=streamed("application/jsonl"),
)
async def errors(request: Request, batch_id: str) -> Response:
    """The lines that failed, each with its reason."""
    return await _download(request, batch_id, "errors")


async def _download(request: Request, batch_id: str, kind: Kind) -> Response:
    state = state_of(request)
    if not is_link(request.scope):
        return await download(state, await find(state, batch_id, owner(request), *_DIALECTS, "bulk"), kind)
    job = None
    if await is_signed(state, request, batch_id, kind):
        async with state.store.read() as connection:
            job = await jobs.get(connection, batch_id)
    if job is None:
        raise NotFoundError("This link is not valid, or no longer.")
    return await download(state, job, kind)
