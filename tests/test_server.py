"""The server's own protocol: connections that ask nothing, or stop in the middle."""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from fundament import server


async def answering(scope: dict[str, Any], receive: Any, send: Any) -> None:
    del scope
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


POST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: he", POST + b"half"],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_connection_that_falls_silent_is_closed(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(server, "_SILENT_SECONDS", 0.1)

    async def scenario() -> None:
        config, state = uvicorn.Config(answering, ws="none", log_config=None, timeout_keep_alive=60), ServerState()
        made = partial(server._Protocol, config, state, {})
        listening = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        address = listening.sockets[0].getsockname()
        async with asyncio.timeout(20):
            asking, out = await asyncio.open_connection(*address)
            out.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert (await asking.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            silent, other = await asyncio.open_connection(*address)
            other.write(sent)
            assert await silent.read() == b""
            assert len(state.connections) == 1  # the one that has asked
            out.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert (await asking.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        for writer in (out, other):
            writer.close()
            await writer.wait_closed()
        listening.close()

    runner.run(scenario())


def test_a_body_may_come_slowly(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SILENT_SECONDS", 0.3)

    async def scenario() -> None:
        config, state = uvicorn.Config(answering, ws="none", log_config=None), ServerState()
        made = partial(server._Protocol, config, state, {})
        listening = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        async with asyncio.timeout(20):
            answer, out = await asyncio.open_connection(*listening.sockets[0].getsockname())
            out.write(POST)
            for _ in range(9):
                await asyncio.sleep(0.1)
                out.write(b"a")
            assert (await answer.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        out.close()
        await out.wait_closed()
        listening.close()

    runner.run(scenario())


@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"], ids=["httptools", "h11"])
def test_an_answer_that_nobody_takes_is_cut_and_one_that_is_taken_slowly_is_not(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, offer: bytes
) -> None:
    monkeypatch.setattr(server, "_UNREAD_SECONDS", 0.3)
    n_bytes, gone = 30_000_000, asyncio.Event()

    async def large(scope: dict[str, Any], receive: Any, send: Any) -> None:
        length = str(n_bytes).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        unread = scope["path"] == "/unread"
        await send({"type": "http.response.body", "body": b"x" * n_bytes, "more_body": unread})
        if unread:  # it is not at its end
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

    async def scenario() -> None:
        config, state = uvicorn.Config(large, ws="none", log_config=None), ServerState()
        made = partial(server._Protocol, config, state, {})
        listening = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        address = listening.sockets[0].getsockname()
        async with asyncio.timeout(60):
            answer, out = await asyncio.open_connection(*address)
            out.write(b"GET /slowly HTTP/1.1\r\nHost: here\r\n" + offer + b"\r\n")
            await answer.readuntil(b"\r\n\r\n")
            for _ in range(10):
                await answer.readexactly(n_bytes // 10)
                await asyncio.sleep(0.1)
            _, other = await asyncio.open_connection(*address, limit=1_000)
            other.write(b"GET /unread HTTP/1.1\r\nHost: here\r\n" + offer + b"\r\n")
            await gone.wait()
        for writer in (out, other):
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        listening.close()

    runner.run(scenario())
