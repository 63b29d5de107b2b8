"""How long an answer is worked for: while the client is there, and within the time that a request may take."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from fundament.api.state import state_of
from fundament.errors import BodyError, TimedOutError

T = TypeVar("T")

CLIENT_GONE = 499  # a status that nobody reads


async def while_awaited(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work` while the client is there, and no longer than `request_seconds`: then it is cancelled, as there.

    Raises:
        BodyError: the client has gone; nobody reads it.
        TimedOutError: the time is over.
    """
    return await while_connected(request, work, state_of(request).settings.request_seconds or None)


async def while_connected(request: Request, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
    """Await `work`, and cancel it when the client closes the connection: its waiting rows then cost nothing.

    Args:
        request: whose client.
        work: what is awaited, in the task that asks.
        seconds: after which it is cancelled too; None waits however long.

    Raises:
        BodyError: the client has gone; nobody reads it.
        TimedOutError: the time is over.
    """
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        if not limit.expired():
            limit.reschedule(0)  # in the past: at once

    try:
        async with asyncio.timeout(seconds) as limit:
            watching = asyncio.ensure_future(watch())
            try:
                return await work
            finally:
                watching.cancel()
    except TimeoutError:
        if gone:
            raise BodyError(CLIENT_GONE, "The client closed the connection.") from None
        if seconds is not None and limit.expired():
            raise TimedOutError(seconds) from None
        raise
