"""The worker: takes chunks of batch jobs, runs their lines through the API's own verb, and names what it wrote.

Any number of workers share the store; `fundament serve` runs one. Each holds a few chunks at a time, so that the
models never wait for a file or a transaction. What a worker holds it keeps by renewing its leases; where it is gone,
the leases lapse and another one takes the chunks.
"""

import asyncio
import errno
import logging
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from fundament.api.state import State
from fundament.depot import identity
from fundament.errors import UnavailableError
from fundament.fetching import Fetcher, read_networks
from fundament.store import leases
from fundament.store.jobs import Job
from fundament.store.leases import Chunk
from fundament.telemetry import say, say_rarely
from fundament.worker.chunks import run_chunk
from fundament.worker.housekeeping import expire, sweep
from fundament.worker.inputs import read_input
from fundament.worker.webhooks import Webhooks

_CHUNKS_AT_A_TIME = 4
_INPUTS_AT_A_TIME = 4  # of each kind: those that lie here, and those that are fetched
_IDLE_SECONDS = 1.0  # between looks at a store that has nothing to do
_DISK_SECONDS = 5.0  # between tries on a disk that is full
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Worker:
    """One process's share of the work.

    Args:
        state: the application's parts; its engine runs the lines.
    """

    def __init__(self, state: State) -> None:
        self.state, self.store = state, state.store
        self.name = secrets.token_hex(8)
        self._lease = timedelta(seconds=state.settings.job_lease_seconds)
        self._woken = asyncio.Event()
        self._chunks: dict[int, asyncio.Task[None]] = {}
        self._suspect: asyncio.Task[None] | None = None  # runs a chunk over which a worker died; nothing runs beside it
        self._inputs: dict[str, asyncio.Task[None]] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        # Of its own: requests that wait for slow servers hold up no input of a job and no webhook.
        self._fetcher = Fetcher(read_networks(state.settings.allowed_networks))
        self._webhooks = Webhooks(state, self._fetcher)

    def wake(self) -> None:
        """Look for work at once."""
        self._woken.set()

    async def run(self) -> None:
        """Work until cancelled; what is held is then let go, for others to take.

        Where a model has died in this process, over one of the chunks perhaps, leases lapse as if all of it had.
        """
        loops = (self._work, self._keep_leases, self._keep_house, partial(sweep, self.state))
        tasks = [asyncio.create_task(_forever(loop)) for loop in loops]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            of_jobs = (*self._chunks.values(), *self._inputs.values(), *self._fetches.values())
            held = [*tasks, *of_jobs, *self._webhooks.tasks]
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            await self._fetcher.close()
            if self.state.death() is None:
                async with self.store.write() as connection:
                    await leases.release(connection, self.name)

    async def _work(self) -> None:
        """Take what there is room for, then wait until something ends or somebody wakes us."""
        self._woken.clear()
        # What lies here never waits for what is fetched, which takes as long as its server pleases.
        for reading, fetched in ((self._inputs, False), (self._fetches, True)):
            while len(reading) < _INPUTS_AT_A_TIME and (job := await self._claim(fetched=fetched)):
                self._start(reading, job.id, read_input(self.state, self.name, job, self._fetcher))
        while self._has_room() and (taken := await self._take()):
            job, chunk = taken
            task = self._start(self._chunks, chunk.id, run_chunk(self.state, self.name, job, chunk))
            if chunk.n_tries > 1:
                self._suspect = task
        await _at_most(_IDLE_SECONDS, self._woken.wait())

    def _has_room(self) -> bool:
        alone = self._suspect is not None and not self._suspect.done()
        return len(self._chunks) < _CHUNKS_AT_A_TIME and not alone and self.state.death() is None

    def _start(
        self, held: dict[Any, asyncio.Task[None]], key: object, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        held[key] = task

        def ended(_: asyncio.Task[None]) -> None:
            if held.get(key) is task:
                del held[key]
            self.wake()

        task.add_done_callback(ended)
        return task

    async def _claim(self, *, fetched: bool) -> Job | None:
        here, now = await identity(self.state.depot), datetime.now(UTC)
        most = _INPUTS_AT_A_TIME // 2  # so that no key's slow servers keep the others' out
        async with self.store.write() as connection:
            return await leases.claim(
                connection, self.name, here, fetched=fetched, most=most, now=now, until=now + self._lease
            )

    async def _take(self) -> tuple[Job, Chunk] | None:
        here, models = await identity(self.state.depot), sorted(self.state.served())
        now = datetime.now(UTC)
        async with self.store.write() as connection:
            taken = await leases.take(connection, self.name, here, models, now=now, until=now + self._lease)
            if taken is not None and taken[1].n_tries > 1 and self._chunks:
                # It runs alone, so that nothing else dies with it: its turn comes when what runs now has ended.
                await connection.rollback()
                return None
            return taken

    async def _keep_leases(self) -> None:
        """Renew what is held; what was lost, or whose job has ended, is given up."""
        await asyncio.sleep(self._lease.total_seconds() / 4)
        chunks, inputs = dict(self._chunks), self._inputs | self._fetches
        if not chunks and not inputs:
            return
        async with self.store.write() as connection:
            until = datetime.now(UTC) + self._lease
            held = await leases.beat(connection, self.name, list(chunks), list(inputs), until=until)
        for key, task in (chunks | inputs).items():
            if key not in held:
                task.cancel()

    async def _keep_house(self) -> None:
        """Remove what has expired, call the webhooks that are due."""
        await expire(self.state)
        await self._webhooks.call_due()
        await asyncio.sleep(_IDLE_SECONDS)


async def _forever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do something again and again; a store that does not answer is waited for."""
    while True:
        try:
            await work()
        except UnavailableError as error:
            say_rarely("jobs wait for the store", reason=error.detail)
            await asyncio.sleep(_IDLE_SECONDS)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                say("jobs wait for the disk", level=logging.WARNING, reason=error.strerror)
                await asyncio.sleep(_DISK_SECONDS)
            else:
                say("unexpected error", level=logging.ERROR, error=error)
                await asyncio.sleep(_IDLE_SECONDS)


async def _at_most(seconds: float, work: Coroutine[Any, Any, Any]) -> None:
    # Not `wait_for`, which loses a cancellation that comes as the work is done (Python 3.11): the worker would not end.
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await work
