"""What holds for the whole process, and its end: what is on its way is still answered."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from fundament import server
from fundament.config import Settings
from tests.test_connections import GET, answering, close

OPENMP = ("OMP_", "GOMP_", "KMP_")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_helpers_look_out_for_work_as_the_environment_says(given: dict[str, str], found: dict[str, str]) -> None:
    program = (
        "import json, os, sys; from fundament import config, server; server.prepare(config.Settings());"
        "assert 'torch' not in sys.modules;"  # which reads them when it is loaded
        f"print(json.dumps({{name: value for name, value in os.environ.items() if name.startswith({OPENMP})}}))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    told = subprocess.run([sys.executable, "-c", program], env={**kept, **given}, capture_output=True, check=True)
    assert json.loads(told.stdout) == found


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize(("given", "keeps"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_memory_that_was_freed_is_used_again(given: dict[str, str], keeps: bool) -> None:
    program = (
        "import resource; from fundament import config, server; server.prepare(config.Settings());"
        "faults = lambda: (b'x' * 30_000_000, resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1];"
        "print(-faults() + faults())"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    told = subprocess.run([sys.executable, "-c", program], env={**kept, **given}, capture_output=True, check=True)
    assert (int(told.stdout) < 1_000) == keeps


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_of_both_kinds() -> None:
    (listening,) = server.listen("::", 0)
    with listening:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, listening.getsockname()[1]), timeout=10).close()


def test_what_was_sent_before_the_port_closed_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a connection that is kept, and on one that nobody had accepted."""

    async def work() -> None:
        sockets = server.listen("127.0.0.1", 0)
        address = sockets[0].getsockname()
        late: list[socket.socket] = []

        def backlog(listening: Any) -> Any:
            late.append(socket.create_connection(address))
            return iter([Gone(), *accept(listening)])

        accept = server._backlog
        monkeypatch.setattr(server, "_backlog", backlog)
        settings = Settings(drain_seconds=0.001)
        ending = server._Server(server.configured(Application(), settings))  # type: ignore[arg-type]
        ending.settings = settings
        async with asyncio.timeout(60):
            serving = asyncio.create_task(ending.serve(sockets))
            while not ending.started:
                await asyncio.sleep(0.01)
            came, out = await asyncio.open_connection(*address)
            assert await ask(came, out) == ANSWERED
            await came.readuntil(b"ok")
            ending._end(signal.SIGTERM)
            while not late:
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(*address)
            assert await ask(came, out) == ANSWERED
            came_late, out_late = await asyncio.open_connection(sock=late[0])
            assert await ask(came_late, out_late) == ANSWERED
            await close(out, out_late)
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving

    monkeypatch.setattr(server, "_LAST_SECONDS", 60)
    asyncio.run(work())


class Gone:
    """A connection whose client has left before it was accepted."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionResetError


class Application:
    """What answers, with the parts that the server asks for."""

    def __init__(self) -> None:
        parts = SimpleNamespace(served=dict, n_running=0, closing=False, deadline=None, death=lambda: None)
        self.state = SimpleNamespace(parts=parts)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await answering(scope, receive, send)


ANSWERED = b"HTTP/1.1 200 OK\r\n"


async def ask(came: asyncio.StreamReader, out: asyncio.StreamWriter) -> bytes:
    out.write(GET + b"\r\n")
    return await came.readline()
