"""Around every request: its id, what is left of its caller's limits, its log line, its count and its time."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fundament.api import errors
from fundament.api.auth import rate_headers
from fundament.api.state import State
from fundament.errors import UnavailableError
from fundament.telemetry import say


class RequestMiddleware:
    """Names, counts, times and logs every request, and answers those that end in an error nobody expected.

    Args:
        app: what answers.
        state: where requests are counted.
        routes: what there is, to say which of them a request was for that was not let in.
    """

    def __init__(self, app: ASGIApp, state: State, routes: Sequence[BaseRoute]) -> None:
        self.app, self.state, self.routes = app, state, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        if len(path := scope["path"]) > 1:  # a base URL with a slash too many is meant without
            scope["path"] = path.removesuffix("/")
        request_id = f"{random.getrandbits(128):032x}"
        details = scope.setdefault("state", {})
        details["request_id"] = request_id
        status = 0  # no answer has begun

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
                if self.state.closing:  # the next request goes to another server, or comes too late
                    message["headers"].append((b"connection", b"close"))
                message["headers"].extend(rate_headers(details.get("visit")))
            await send(message)

        self.state.n_running += 1
        try:
            await self.app(scope, receive, stamped)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError):  # the server ends, and this request is past its deadline
                answer = errors.render(UnavailableError("The server is closing."), request_id)
            else:
                answer = errors.unexpected(error, request_id)
            if status:
                raise
            await answer(scope, receive, stamped)
        finally:
            self.state.n_running -= 1
            seconds = time.perf_counter() - started
            route = self._path_of(scope)
            self.state.metrics.requests.labels(route, str(status)).inc()
            self.state.metrics.request_seconds.labels(route).observe(seconds)
            say(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=route,
                status=status,
                ms=round(seconds * 1000, 1),
                **{**_key_of(details), **details.get("log", {}), **_reason_of(details)},
            )

    def _path_of(self, scope: Scope) -> str:
        """The path of a request's route, as in `/v1/admin/keys/{key_id}`.

        What callers make up is no route and must not become a label of the metrics: that is `other`.
        """
        route = scope.get("route")
        if route is None:
            matches = [(each, each.matches(scope)[0]) for each in self.routes]
            best, match = max(matches, key=lambda found: found[1].value)  # another method's, where none has this one
            route = None if match is Match.NONE else best
        return getattr(route, "path_format", "other")


def _key_of(details: dict[str, Any]) -> dict[str, str]:
    """The id of the key that asked, where one did."""
    caller = details.get("caller")
    return {"key": caller.key_id} if caller is not None and caller.key_id else {}


def _reason_of(details: dict[str, Any]) -> dict[str, str]:
    """Why the server could not answer, where it could not."""
    return {"reason": details["reason"]} if "reason" in details else {}
