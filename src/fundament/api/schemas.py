"""The shapes of answers, as the public specification has them, and what a route's documentation says of them."""

from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

from pydantic import BaseModel, Field, RootModel
from pydantic.json_schema import SkipJsonSchema

T = TypeVar("T")


class OpenAIError(BaseModel):
    """The same error in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]


OrAbsent = Annotated[T | SkipJsonSchema[None], Field(json_schema_extra=_without_default)]
"""A value, or no such key in the answer."""


class ErrorResponse(BaseModel):
    """Every error but 422."""

    detail: str
    code: OrAbsent[str] = None
    request_id: str
    error: OpenAIError


class FieldError(BaseModel):
    """One wrong field."""

    field: str
    message: str
    type: str
    input: Any = None


class HTTPValidationError(BaseModel):
    """422: the first wrong field in words, then each."""

    detail: str
    request_id: str
    errors: list[FieldError]
    error: OpenAIError


class EmbeddingUsage(BaseModel):
    """Tokens read; the first two numbers are equal. The others say how many of them stand for media."""

    total_tokens: int
    prompt_tokens: int
    image_tokens: OrAbsent[int] = None
    audio_tokens: OrAbsent[int] = None
    video_tokens: OrAbsent[int] = None


class ELSERV2EmbeddingUsage(BaseModel):
    """Tokens read by elser-v2; it writes none."""

    total_tokens: int
    input_tokens: int
    output_tokens: int


class SingleEmbeddingData(BaseModel):
    """One input's vector, or its weight of each token, the heaviest first."""

    object: str
    index: int
    embedding: list[float] | str | dict[str, list[float] | str] | dict[str, float]


TokenVectors = list[list[float]] | list[str]


class MultiEmbeddingData(BaseModel):
    """One input's vectors, one per token."""

    object: str
    index: int
    embeddings: TokenVectors | dict[str, TokenVectors]
    tokenized_input: OrAbsent[list[str]] = None


class EmbeddingResponse(BaseModel):
    """One item per input, in order."""

    model: str
    object: str
    usage: EmbeddingUsage | ELSERV2EmbeddingUsage
    data: list[SingleEmbeddingData] | list[MultiEmbeddingData]


class ChatMessage(BaseModel):
    """What the model wrote."""

    role: str
    content: str


class ChatChoice(BaseModel):
    """The answer, and why it ends: `stop` or `length`."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: str


class ChatUsage(BaseModel):
    """Tokens read, those of images included, and tokens written, the one that ended the answer included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    """A whole answer. With `stream` the body is `text/event-stream`: chunks of OpenAI's form, then `[DONE]`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage


class BaseUsage(BaseModel):
    """Tokens read."""

    total_tokens: int


class ClassificationPredictionLabel(BaseModel):
    """A candidate and how likely it is."""

    label: str
    score: float


class ClassificationPrediction(BaseModel):
    """One input's likeliest label and every label's score, each by group where the labels came in groups."""

    object: str
    index: int
    prediction: str | dict[str, str]
    score: float | dict[str, float]
    predictions: list[ClassificationPredictionLabel] | dict[str, list[ClassificationPredictionLabel]]


class ClassificationResponse(BaseModel):
    """One item per input, in order."""

    usage: BaseUsage
    data: list[ClassificationPrediction]


class TrainingResponse(BaseModel):
    """What was trained, and on how many examples."""

    classifier_id: UUID
    num_samples: int
    usage: BaseUsage


class ClassifierSummary(BaseModel):
    """A trained classifier."""

    classifier_id: UUID
    user_id: UUID
    model: str
    labels: list[str]
    access: str
    updated_number: int
    used_number: int
    created_at: datetime
    updated_at: datetime
    used_at: datetime | None
    is_active: bool
    is_latest: bool
    metadata_: dict[str, Any]


class OwnedClassifier(ClassifierSummary):
    """A trained classifier and the key that made it; null where no key did."""

    key_id: str | None


class OwnedClassifierList(BaseModel):
    """Everybody's classifiers, the oldest first."""

    object: str
    data: list[OwnedClassifier]


class Deleted(BaseModel):
    """What is gone."""

    classifier_id: UUID
    object: str
    deleted: bool


class RerankingResult(BaseModel):
    """One document's score."""

    index: int
    relevance_score: float
    document: OrAbsent[str | dict[str, Any]] = None
    embedding: OrAbsent[list[float]] = None


class RerankingResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    object: str
    usage: BaseUsage
    results: list[RerankingResult]


class Status(BaseModel):
    """How the process is."""

    status: str


class ModelPricing(BaseModel):
    """Prices per token; everything is free on your own hardware."""

    prompt: str
    completion: str
    image: str
    request: str
    input_cache_read: str
    input_cache_write: str


class ModelInfo(BaseModel):
    """A served model: OpenRouter's fields, then those of OpenAI's list and of the older local reference."""

    id: str
    hugging_face_id: str
    name: str
    created: int
    input_modalities: list[str]
    output_modalities: list[str]
    quantization: str
    context_length: int
    max_output_length: int
    pricing: ModelPricing
    supported_sampling_parameters: list[str]
    supported_features: list[str]
    description: str
    datacenters: list[dict[str, str]]
    object: str
    owned_by: str
    type: str
    max_tokens: int
    dimensions: int | None
    supports_multimodal: bool
    tasks: list[str] | None
    licence: str
    score: str | None
    alias_of: OrAbsent[str] = None


class ModelListResponse(BaseModel):
    """The served models."""

    object: str
    data: list[ModelInfo]


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


class RequestCounts(BaseModel):
    """Lines of a job."""

    total: int
    completed: int
    failed: int


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
    metadata: dict[str, str] | None


class OpenAIBatchPage(BaseModel):
    """A page of jobs, the newest first."""

    object: str
    data: list[OpenAIBatch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchList(RootModel[list[BatchStatus] | OpenAIBatchPage]):
    """Jobs, the newest first; OpenAI's clients get a page of theirs."""


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


class OwnedFile(FileObject):
    """An upload and the key that it is of; null where no key made it."""

    key_id: str | None


class OwnedFileList(BaseModel):
    """Everybody's uploads, the oldest first."""

    object: str
    data: list[OwnedFile]


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: str
    deleted: bool


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


class KeyInfo(BaseModel):
    """A key without its secret; moments are in UTC, ISO 8601."""

    object: str
    id: str
    name: str
    tier: str
    balance: int | None
    admin: bool
    state: str
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    last_used_at: str | None


class NewKey(KeyInfo):
    """A key as it is made: `key` is shown this once."""

    key: str


class KeyList(BaseModel):
    """All keys, the oldest first."""

    object: str
    data: list[KeyInfo]


class UsageLine(BaseModel):
    """What one key used of one model through one endpoint on one day (UTC)."""

    key_id: str
    day: str
    model: str
    endpoint: str
    requests: int
    tokens: int


class UsageList(BaseModel):
    """Usage, by day."""

    object: str
    data: list[UsageLine]


class RateLimits(BaseModel):
    """What a caller may do; 0 is no limit."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrency: int


class Account(BaseModel):
    """The caller's own key, limits and use; `key` is null where no keys are asked for."""

    object: str
    key: KeyInfo | None
    limits: RateLimits
    usage: list[UsageLine]


_ERRORS = {
    400: "A model that is not served, or an input that is too long.",
    401: "No key, or none that works.",
    403: "The key may not do or have this, or its balance is too small.",
    404: "No such resource.",
    409: "The resource is not in the state that this needs, or is being changed.",
    429: "More than the caller may do now; `Retry-After` says when.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "An unexpected error.",
    503: "The server cannot take the request now; `Retry-After` says when.",
    504: "The request took longer than one may take here.",
}

OF_MANY = (401, 403, 429, 500, 503)
"""The errors of a route that lists what a key may see."""
OF_ONE = (401, 403, 404, 429, 500, 503)
"""The errors of a route of one thing, by its id."""
OF_STATE = (401, 403, 404, 409, 429, 500, 503)
"""The same where it must be in a state for what is asked."""


def responses(
    shape: type[Any], *, errors: tuple[int, ...] = (400, 401, 403, 413, 415, 429, 500, 503, 504), fields: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for its documentation; 422 where it reads a body or, with `fields`, anything else.

    `4XX` is there because FastAPI otherwise documents 422 by itself, under our component's name and in its own shape.
    """
    documented: dict[int | str, dict[str, Any]] = {
        200: {"model": shape},
        "4XX": {"model": ErrorResponse, "description": "Any other refusal."},
    }
    documented |= {status: {"model": ErrorResponse, "description": _ERRORS[status]} for status in errors}
    if fields or 415 in errors:
        documented[422] = {"model": HTTPValidationError, "description": "A field that does not fit."}
    return documented


def streamed(media_type: str) -> dict[int | str, dict[str, Any]]:
    """The same for a route that answers a file, once there is one."""
    documented = responses(Status, errors=OF_STATE)
    documented[200] = {"description": "The file.", "content": {media_type: {"schema": {"type": "string"}}}}
    return documented


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that reads it itself. What it refers to stays in it, for `api.openapi` to name."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(schema: dict[str, Any]) -> dict[str, Any]:
    """The form of a route that reads it itself."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
