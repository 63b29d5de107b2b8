"""Every error, rendered once: `{detail, code, request_id}`, and `{detail, request_id, errors}` for 422.

Beside these stands `error`, in OpenAI's form: its clients show their users only `error.message`.
"""

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from fundament.api.wire import answer
from fundament.errors import Fault, FundamentError, InputError, near
from fundament.telemetry import say

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def render(error: FundamentError, request_id: str) -> Response:
    """An error as the API answers it; 429 and 503 say when to try again, and OpenAI's clients hear where not to."""
    headers: dict[str, str] = {}
    if wait := error.retry_after_seconds:
        headers["Retry-After"] = str(wait)
    if error.is_final:
        headers["X-Should-Retry"] = "false"
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _write(
        error.status,
        error.detail,
        error.code,
        request_id,
        faults=error.faults if isinstance(error, InputError) else (),
        headers=headers,
    )


def openai_form(error: FundamentError) -> dict[str, str | None]:
    """An error as OpenAI's API has it."""
    return _openai(error.status, error.detail, error.code, error.faults if isinstance(error, InputError) else ())


def _openai(status: int, detail: str, code: str | None, faults: Sequence[Fault]) -> dict[str, str | None]:
    return {
        "message": detail,
        "type": "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error",
        "param": faults[0].field.removeprefix("body -> ") if faults else None,
        "code": code,
    }


def note(error: FundamentError, details: MutableMapping[str, Any]) -> None:
    """Keep for the request's log line why the server could not answer; a caller's own fault is said to them alone."""
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        details["reason"] = error.detail


def unexpected(error: Exception, request_id: str) -> Response:
    """An error that nobody expected: logged whole, answered without what it says."""
    say("unexpected error", level=logging.ERROR, error=error, request_id=request_id)
    return render(FundamentError("An unexpected error occurred."), request_id)


def install(app: FastAPI) -> None:
    """Render our own errors and the framework's."""

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, FundamentError)
        note(error, request.scope["state"])
        return render(error, request.state.request_id)

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status, headers, path = error.status_code, error.headers or {}, request.url.path
        detail, code = str(error.detail), None
        if status == HTTPStatus.NOT_FOUND:
            meant = "" if path.strip("/") == "v1" else near(path, request.app.openapi()["paths"])
            detail, code = f"There is no {path} here; see /docs.{meant}", "RESOURCE_NOT_FOUND"
        elif status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": ", ".join(_methods(request) or ("GET", "HEAD"))}  # files have no method of their own
            detail = f"{path} does not answer {request.method}; use {headers['Allow']}."
        return _write(status, detail, code, request.state.request_id, headers=headers)

    async def query(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = (Fault(" -> ".join(map(str, each["loc"])), each["msg"], each["type"]) for each in error.errors())
        return render(InputError(*faults), request.state.request_id)

    app.add_exception_handler(FundamentError, ours)
    app.add_exception_handler(RequestValidationError, query)
    app.add_exception_handler(HTTPException, framework)


def _methods(request: Request) -> list[str]:
    """Every method that a path answers; the framework names those of its first route only.

    Where a route has this very path, those that only match it by a parameter (`/v1/batch/{id}`) do not speak for it.
    HEAD is not documented.
    """
    if own := request.app.openapi()["paths"].get(request.url.path):
        return [name for name in _METHODS if name.lower() in own or (name == "HEAD" and _answers(request, name))]
    return [method for method in _METHODS if _answers(request, method)]


def _answers(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


def _write(
    status: int,
    detail: str,
    code: str | None,
    request_id: str,
    *,
    faults: Sequence[Fault] = (),
    headers: Mapping[str, str],
) -> Response:
    errors = [
        {"field": fault.field, "message": fault.message, "type": fault.type, "input": fault.input} for fault in faults
    ]
    body = {
        "detail": detail,
        **({"code": code} if code else {}),
        "request_id": request_id,
        **({"errors": errors} if errors else {}),
        "error": _openai(status, detail, code, faults),
    }
    return answer(body, status=status, headers=dict(headers))
