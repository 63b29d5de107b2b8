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
    seconds = state_of(request).settings.request_seconds
    try:
        async with asyncio.timeout(seconds or None) as limit:
            return await while_connected(request, work)
    except TimeoutError:
        if limit.expired():
            raise TimedOutError(seconds) from None
        raise


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and cancel it when the client closes the connection: its waiting rows then cost nothing.

    Raises:
        BodyError: the client has gone; nobody reads it.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise BodyError(CLIENT_GONE, "The client closed the connection.")
    finally:
        gone.cancel()
        if task.cancel():
            await asyncio.wait((task,))  # so that what it held can be closed


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
