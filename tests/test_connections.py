"""The server's own protocol: connections that ask nothing, or stop in the middle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from fundament import connections


async def answering(scope: dict[str, Any], receive: Any, send: Any) -> None:
    del scope
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


GET = b"GET / HTTP/1.1\r\nHost: here\r\n"
POST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n"


OFFER = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


@asynccontextmanager
async def listening(app: Any = answering, **options: Any) -> AsyncIterator[tuple[tuple[str, int], ServerState]]:
    """The protocol on a port of its own: the address, and the connections that it has."""
    config, state = uvicorn.Config(app, ws="none", log_config=None, **options), ServerState()
    made = partial(connections.Connection, config, state, {})
    async with (
        asyncio.timeout(60),
        await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0) as open_server,
    ):
        yield open_server.sockets[0].getsockname(), state


async def close(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def drip(out: asyncio.StreamWriter, piece: bytes) -> None:
    """Send a little again and again, until nobody takes it."""
    with suppress(ConnectionError):
        while True:
            out.write(piece)
            await out.drain()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("first", [b"", GET + OFFER + b"\r\n"], ids=["httptools", "h11"])
@pytest.mark.parametrize(
    ("sent", "then"),
    [(b"", b""), (GET + b"X-", b""), (POST + b"half", b""), (POST.replace(b"9", b"999999"), b"a"), (b"GET /", b"a")],
    ids=["nothing", "half a head", "half a body", "a body in drops", "a head in drops"],
)
def test_a_connection_that_falls_silent_is_closed(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, first: bytes, sent: bytes, then: bytes
) -> None:
    monkeypatch.setattr(connections, "_SILENT_SECONDS", 0.1)
    if first and not sent:
        pytest.skip("a connection that has asked is ended by uvicorn's own timer")

    async def scenario() -> None:
        async with listening(timeout_keep_alive=60) as (address, state):
            asking, out = await asyncio.open_connection(*address)
            out.write(GET + b"\r\n")
            assert (await asking.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            silent, other = await asyncio.open_connection(*address)
            if first:
                other.write(first)
                assert (await silent.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            other.write(sent)
            dripping = asyncio.ensure_future(drip(other, then)) if then else None
            with suppress(ConnectionError):
                assert await silent.read() == b""
            if dripping is not None:
                dripping.cancel()
            while len(state.connections) > 1:
                await asyncio.sleep(0.01)
            out.write(GET + b"\r\n")  # the one that has asked is still there
            assert (await asking.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await close(out, other)

    runner.run(scenario())


@pytest.mark.parametrize("offer", [b"", OFFER], ids=["httptools", "h11"])
def test_a_connection_whose_body_came_after_its_answer_is_closed_too(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, offer: bytes
) -> None:
    monkeypatch.setattr(connections, "_SILENT_SECONDS", 0.1)

    async def at_once(scope: dict[str, Any], receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})

    async def scenario() -> None:
        async with listening(at_once, timeout_keep_alive=1) as (address, state):
            answer, out = await asyncio.open_connection(*address)
            out.write(POST.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n"))
            await answer.readuntil(b"no")
            out.write(b"a" * 9)
            with suppress(ConnectionError):
                assert await answer.read() == b""
            while state.connections:
                await asyncio.sleep(0.01)
            await close(out)

    runner.run(scenario())


@pytest.mark.parametrize("offer", [b"", OFFER], ids=["httptools", "h11"])
def test_a_body_may_come_slowly(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, offer: bytes) -> None:
    monkeypatch.setattr(connections, "_SILENT_SECONDS", 0.3)

    async def scenario() -> None:
        async with listening() as (address, _):
            answer, out = await asyncio.open_connection(*address)
            out.write(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 4500\r\n" + offer + b"\r\n")
            for _ in range(9):
                await asyncio.sleep(0.1)
                out.write(b"a" * 500)
            assert (await answer.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await close(out)

    runner.run(scenario())


CHUNKED = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "endless", "said"),
    [
        (GET, b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 431 "),
        (GET + b"X-A: ", b"a" * 1000, b"HTTP/1.1 431 "),
        (b"\r\n" + GET, b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 431 "),
        (POST + b"a" * 9 + GET, b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 200 "),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"X-A: " + b"a" * 1000 + b"\r\n", b""),
        (CHUNKED + b"1;", b"a" * 1000, b""),
        (GET + OFFER, b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 431 "),
        (GET + OFFER + b"\r\n" + GET, b"X-A: " + b"a" * 1000 + b"\r\n", b"HTTP/1.1 200 "),
    ],
    ids=["lines", "a line", "after an empty line", "behind a body", "trailers", "an extension", "h11", "h11's next"],
)
def test_a_head_without_end_is_refused(runner: asyncio.Runner, sent: bytes, endless: bytes, said: bytes) -> None:
    async def scenario() -> None:
        async with listening() as (address, state):
            answer, out = await asyncio.open_connection(*address)
            out.write(sent)
            await out.drain()
            with suppress(ConnectionError):
                for _ in range(1000):  # a megabyte
                    out.write(endless)
                    await out.drain()
                    await asyncio.sleep(0)
            heard = b""
            with suppress(ConnectionError):
                heard = await answer.read()
            assert heard.startswith(said) or not heard  # what was said may be lost with the connection
            assert not state.connections
            await close(out)

    runner.run(scenario())


def test_a_large_head_is_read(runner: asyncio.Runner) -> None:
    async def scenario() -> None:
        async with listening() as (address, _):
            answer, out = await asyncio.open_connection(*address)
            out.write(GET + b"X-A: " + b"a" * 60_000 + b"\r\n\r\n")
            assert (await answer.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await close(out)

    runner.run(scenario())


@pytest.mark.parametrize("offer", [b"", OFFER], ids=["httptools", "h11"])
def test_an_answer_that_nobody_takes_is_cut_and_one_that_is_taken_slowly_is_not(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, offer: bytes
) -> None:
    monkeypatch.setattr(connections, "_UNREAD_SECONDS", 0.3)
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
        async with listening(large) as (address, _):
            answer, out = await asyncio.open_connection(*address)
            out.write(b"GET /slowly HTTP/1.1\r\nHost: here\r\n" + offer + b"\r\n")
            await answer.readuntil(b"\r\n\r\n")
            for _ in range(10):
                await answer.readexactly(n_bytes // 10)
                await asyncio.sleep(0.1)
            _, other = await asyncio.open_connection(*address, limit=1_000)
            other.write(b"GET /unread HTTP/1.1\r\nHost: here\r\n" + offer + b"\r\n")
            await gone.wait()
            await close(out, other)

    runner.run(scenario())
