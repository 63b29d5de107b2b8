"""What a route's documentation says of its body and its answers, and the shapes that several routes share."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field
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


class BaseUsage(BaseModel):
    """Tokens read."""

    total_tokens: int


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
    """The answers of a route, for its documentation; 422 where it reads a body or, with `fields`, anything else."""
    return {200: {"model": shape}, **_refusals(errors, fields=fields)}


def streamed(media_type: str) -> dict[int | str, dict[str, Any]]:
    """The same for a route that answers a file, once there is one."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {200: {"description": "The file.", "content": content}, **_refusals(OF_STATE)}


def _refusals(errors: tuple[int, ...], *, fields: bool = False) -> dict[int | str, dict[str, Any]]:
    # Without `4XX` FastAPI documents 422 by itself, under our component's name and in its own shape.
    documented: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse, "description": "Any other refusal."}}
    documented |= {status: {"model": ErrorResponse, "description": _ERRORS[status]} for status in errors}
    if fields or 415 in errors:
        documented[422] = {"model": HTTPValidationError, "description": "A field that does not fit."}
    return documented


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that reads it itself. What it refers to stays in it, for `api.openapi` to name."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(schema: dict[str, Any]) -> dict[str, Any]:
    """The form of a route that reads it itself."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
