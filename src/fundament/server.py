"""Running the application as a process: the sockets, the signals, the order in which it ends."""

import asyncio
import ctypes
import errno
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from fundament import __version__
from fundament.config import Settings
from fundament.connections import Connection
from fundament.errors import FundamentError, why
from fundament.telemetry import configure_logs, log, say

_BACKLOG = 2048  # connections that wait to be accepted
_KEPT_SECONDS = 75  # longer than proxies keep one (60, nginx and AWS): who closes first never loses a request
_MOST_FILES = 65_536  # connections are files: the usual limit of 1,024 is for programs that look at each in turn
_SWITCH_SECONDS = 0.001  # Python's own is five times as long
_KEPT_MEMORY = {-1: 128 * 1024**2, -3: 32 * 1024**2}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
_LAST_SECONDS = 0.5  # that what had been sent when the port closed may take to get here
_LOOK_SECONDS = 1.0  # between looks whether a model of a worker has died
_IDLE_THREAD_SECONDS = 0.5  # that a thread with nothing to do may take to end


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, or until a model has died.

    Raises:
        FundamentError: something that cannot be served here, or of what the model died.
    """
    prepare(settings)
    refuse_open(settings.host, settings.auth)
    # Before the application, so that a port that is taken is said at once.
    sockets = listen(settings.host, settings.port)
    from fundament.app import create_app

    app = create_app(settings)
    server = _Server(configured(app, settings))
    logging.getLogger("uvicorn").handlers = log.handlers  # its warnings, in the form of our own lines
    server.settings = settings
    server.run(sockets)
    refuse_death(server.death)


def configured(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=_KEPT_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_seconds),
    )


def work(settings: Settings) -> None:
    """Run batch jobs, without a port, until SIGTERM or Ctrl-C, or a model's death; what is not done then others take.

    Raises:
        FundamentError: something that cannot be served here, or of what the model died.
    """
    prepare(settings)
    from fundament.app import create_app

    app = create_app(settings.model_copy(update={"worker": True}))
    # The server's kind of loop: names are looked up on threads of its own, not on those that files are read on.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        refuse_death(runner.run(_work(app)))


async def _work(app: FastAPI) -> str | None:
    ended, loop, parts = asyncio.Event(), asyncio.get_running_loop(), app.state.parts
    loop.set_default_executor(threads := ThreadPoolExecutor())
    for number in ending_signals():
        loop.add_signal_handler(number, ended.set)
    async with app.router.lifespan_context(app):
        say("working", version=__version__, models=",".join(sorted(parts.served())))
        while not ended.is_set() and not parts.death():
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await ended.wait()
        death: str | None = parts.death()
        parts.deadline = time.monotonic() + parts.settings.shutdown_seconds
        say("closing")
    leave(threads, parts.deadline, death)
    return death


def refuse_death(death: str | None) -> None:
    """End with an error where a model has died: what supervises the process starts it anew, which nothing else mends.

    Raises:
        FundamentError: of what it died.
    """
    if death is not None:
        raise FundamentError(f"{death} Start the server anew.")


def ending_signals() -> list[signal.Signals]:
    """The signals that end the process in good order: SIGHUP too, unless it is ignored, as under `nohup`."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hung_up]


def leave(threads: ThreadPoolExecutor, deadline: float, death: str | None = None) -> None:
    """End the process here where a thread is still busy at the deadline; otherwise return, and it ends as usual.

    A thread in the midst of a forward pass or a load cannot be stopped. An interpreter that ends waits for those of
    pools however long, and one that it does not wait for can abort the process when it comes back.

    Args:
        threads: the event loop's default pool.
        deadline: by `time.monotonic()`.
        death: of what a model has died, which the exit code tells.
    """
    threads.shutdown(wait=False)
    deadline = max(deadline, time.monotonic() + _IDLE_THREAD_SECONDS)
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    with suppress(KeyboardInterrupt):  # whoever does not want to wait
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
    if busy := [thread.name for thread in others if thread.is_alive()]:
        say("threads left behind", level=logging.WARNING, threads=",".join(busy))
        logging.shutdown()
        os._exit(1 if death else 0)


def prepare(settings: Settings) -> None:
    """What holds for the whole process: its files, its threads, its logs."""
    os.umask(0o077)  # what callers hand in, and what is made of it, is nobody else's
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < (most := _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    # Text is tokenized on our own worker threads; the tokenizer's pool would compete with the models for cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Compiled products are kept by shape, some hundred for each model; the default holds 1,024 in all.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    # What GNU's OpenMP does by itself, but where a process has more threads than cores, as with two models: there
    # helpers look out for the next operator ten times as long before they sleep. LLVM's would look out for ever, but
    # for the last.
    openmp = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
    if not os.environ.keys() & openmp:
        os.environ.update(openmp)
    # Names are looked up on the event loop's threads, half of them at once: those that do not answer hold theirs long.
    os.environ.setdefault("UV_THREADPOOL_SIZE", "64")
    # Tensors of 2 MiB and more lie in huge pages, which spares large models faults and lookups of pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _keep_memory()
    # A model's thread asks for the interpreter between any two operators, and should not wait for whole requests
    # (`benchmarks/server.py --only crowd`).
    sys.setswitchinterval(_SWITCH_SECONDS)
    configure_logs(settings.log_format, settings.log_level)


def _keep_memory() -> None:
    """Have glibc's arenas keep what is free, up to 128 MiB each: a large body's parsing waits for every new page.

    Where the allocator is another, or the operator has set it, nothing changes (`benchmarks/server.py --only gap`).
    """
    if not any(name.startswith("MALLOC_") for name in os.environ) and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, n_bytes in _KEPT_MEMORY.items():
            libc.mallopt(parameter, n_bytes)


def refuse_open(host: str, auth: bool | None) -> None:
    """Refuse to serve others than this machine's own users without a word about keys.

    Raises:
        FundamentError: the host is beyond loopback, and nobody said whether keys are asked for.
    """
    if auth is None and not is_loopback(host):
        raise FundamentError(
            f"on {host} others than this machine's own users can call. Ask for keys with --auth "
            "(make one: fundament keys create NAME), or say --no-auth where something else keeps them out."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host, on each of its addresses; a name that has none reaches nobody."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror:
        return True
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`, all on one port; clients that come early wait in their backlog.

    Raises:
        FundamentError: the port is taken or not allowed, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise FundamentError(f"host '{host}' is not an address: {error.strerror}") from error
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    # `::` alone is every address, of both kinds, as elsewhere.
    both = len(found) == 1 and found[0][4][0] == "::" and socket.has_dualstack_ipv6()
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            place = (address[0], port, *address[2:])
            sockets.append(socket.create_server(place, family=family, backlog=_BACKLOG, dualstack_ipv6=both))
        except OSError as error:
            # A name such as localhost stands for addresses that not every machine has.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for opened in sockets:
                    opened.close()
                raise _refusal(f"{host} port {port}", error, "--port") from error
            absent = error
        port = sockets[0].getsockname()[1] if sockets else port
    if not sockets and absent is not None:
        raise _refusal(host, absent, "--host") from absent
    return sockets


def _refusal(where: str, error: OSError, option: str) -> FundamentError:
    return FundamentError(f"cannot listen on {where}: {why(error)}. Choose another with {option}.")


def _backlog(sockets: Iterable[socket.socket]) -> Iterator[socket.socket]:
    """The connections that clients have made and nobody has accepted: closing the port would reset them."""
    for listening in sockets:
        while True:
            try:
                connection, _ = listening.accept()
            except ConnectionAbortedError:  # a client that has left again
                continue
            except OSError:
                break
            connection.setblocking(False)
            yield connection


class _Server(uvicorn.Server):
    """Uvicorn that drains on SIGTERM: `/ready` says 503 first, the port closes later, the exit code is 0."""

    settings: Settings
    death: str | None = None  # of what a model has died, where that ends the server
    _drains = False  # whether callers may still send, and do not know yet that this server ends

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal; nothing waits for threads that are busy after the deadline."""
        asyncio.get_running_loop().set_default_executor(threads := ThreadPoolExecutor())
        await super().serve(sockets)
        leave(threads, 0 if self.force_exit else self._parts.deadline or 0, self.death)

    @property
    def _parts(self) -> Any:
        return self.config.app.state.parts  # type: ignore[union-attr]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say where."""
        await super().startup(sockets)
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        # Set on the loop after uvicorn's own handlers: those raise the signal again at the end, and the exit code
        # would tell a supervisor that the server was killed.
        for number in ending_signals():
            loop.add_signal_handler(number, self._end, number)
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        say("serving", version=__version__, url=f"http://{host}:{port}", models=",".join(self._models()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then connections; after a drain what is on its way meanwhile is still answered."""
        if self._drains:
            arrived = list(_backlog(sockets or ()))
            for server in self.servers:
                server.close()
            for connection in arrived:
                made = partial(Connection, self.config, self.server_state, self.lifespan.state)
                with suppress(OSError):  # its client may have left
                    await asyncio.get_running_loop().connect_accepted_socket(made, connection)
            await asyncio.sleep(_LAST_SECONDS)
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """End where a model has died; a few times a second."""
        if not self._parts.closing and (death := self._parts.death()):
            self.death = death
            self._end(signal.SIGTERM)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal before the start is complete."""
        del frame
        self._end(sig)

    def _models(self) -> list[str]:
        return sorted(self._parts.served())

    def _end(self, number: int) -> None:
        if self.should_exit:
            self.force_exit = number == signal.SIGINT
            return
        parts = self._parts
        already, parts.closing = parts.closing, True
        wait = 0 if already or number == signal.SIGINT or not self.started else self.settings.drain_seconds
        parts.deadline = time.monotonic() + wait + self.settings.shutdown_seconds
        self._drains = wait > 0
        say("closing", running=parts.n_running)
        asyncio.get_running_loop().call_later(wait, setattr, self, "should_exit", True)
