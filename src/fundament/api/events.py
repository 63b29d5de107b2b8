"""Server-sent events: an answer that goes out piece by piece, in OpenAI's form."""

import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from fundament.api.errors import openai_form
from fundament.api.presence import CLIENT_GONE, while_connected
from fundament.api.wire import json_bytes
from fundament.errors import BodyError, FundamentError
from fundament.telemetry import say

DONE = b"data: [DONE]\n\n"  # the last one


def event(value: dict[str, Any]) -> bytes:
    """A value as an event."""
    return b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events, until they end or the client leaves.

    Args:
        request: what is answered.
        source: what the events are made from; closed at the end, so that it goes with the client.
        events: what is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, source: AsyncGenerator[Any, None], events: AsyncGenerator[bytes, None]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._source, self._events = request, source, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        del scope, receive
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(self._request, self._send(send))
        except BodyError as error:
            if error.status != CLIENT_GONE:
                raise
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except FundamentError as error:
            await send({"type": "http.response.body", "body": _broken(error), "more_body": True})
        except OSError:
            return
        except Exception as error:
            say("unexpected error", level=logging.ERROR, error=error, request_id=self._request.state.request_id)
            unexpected = _broken(FundamentError("An unexpected error occurred."))
            await send({"type": "http.response.body", "body": unexpected, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _broken(error: FundamentError) -> bytes:
    """An error behind the beginning of an answer, whose status is sent: OpenAI's clients raise it."""
    return event({"error": openai_form(error)})
