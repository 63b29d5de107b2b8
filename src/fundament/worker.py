"""The worker: takes chunks of batch jobs, runs their lines through the API's own verb, and names what it wrote.

Any number of workers share the store; `fundament serve` runs one. Each holds a few chunks at a time, so that the
models never wait for a file or a transaction. What a worker holds it keeps by renewing its leases; where it is gone,
the leases lapse and another one takes the chunks.
"""

import asyncio
import errno
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from fundament import buckets
from fundament.accounts.toll import Toll
from fundament.accounts.visits import NO_LIMITS
from fundament.api.jobs import check_stored, describe, message_secret
from fundament.api.lines import (
    Outcome,
    affordable,
    deadly,
    divide,
    embed_lines,
    error_lines,
    model_of,
    one_by_one,
    output_lines,
    read,
    too_long,
)
from fundament.api.state import State
from fundament.api.wire import json_bytes
from fundament.catalog import ModelSpec, find
from fundament.depot import INPUT, OWNER, identity, of_job, of_upload, on_thread
from fundament.errors import AuthError, BalanceError, FundamentError, LimitError, UnavailableError
from fundament.fetching import Fetcher, read_networks
from fundament.jsonl import csv_lines, jsonl
from fundament.store import files, jobs, keys, leases, usage
from fundament.store.database import name_of
from fundament.store.jobs import Job
from fundament.store.keys import Key
from fundament.store.leases import Chunk, Written
from fundament.store.usage import Line
from fundament.telemetry import say, say_rarely
from fundament.webhooks import DELAYS, deliver

_CHUNKS_AT_A_TIME = 4
_INPUTS_AT_A_TIME = 4  # of each kind: those that lie here, and those that are fetched
_WEBHOOKS_AT_A_TIME, _WEBHOOKS_OF_A_KEY = 8, 2
_MOST_TRIES = 3  # of a chunk over which workers die; then its lines are tried one by one, and of a line then
_IDLE_SECONDS = 1.0  # between looks at a store that has nothing to do
_DISK_SECONDS = 5.0  # between tries on a disk that is full
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PASSING = (errno.EMFILE, errno.ENFILE)  # connections take files too, and end
_STRAY_SECONDS = 3600.0  # an upload may take as long before a row knows it
_FORGET_AFTER = timedelta(days=30)


class Worker:
    """One process's share of the work.

    Args:
        state: the application's parts; its engine runs the lines.
    """

    def __init__(self, state: State) -> None:
        self.state, self.depot, self.store = state, state.depot, state.store
        self.name = secrets.token_hex(8)
        self._woken = asyncio.Event()
        self._chunks: dict[int, asyncio.Task[None]] = {}
        self._suspect: asyncio.Task[None] | None = None  # runs a chunk over which a worker died; nothing runs beside it
        self._inputs: dict[str, asyncio.Task[None]] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._webhooks: dict[asyncio.Task[None], str] = {}  # each with whose job it tells of
        # Of its own: requests that wait for slow servers hold up no input of a job and no webhook.
        self._fetcher = Fetcher(read_networks(state.settings.allowed_networks))

    def wake(self) -> None:
        """Look for work at once."""
        self._woken.set()

    async def run(self) -> None:
        """Work until cancelled; what is held is then let go, for others to take."""
        loops = (self._work, self._keep_leases, self._keep_house, self._sweep)
        tasks = [asyncio.create_task(_forever(loop)) for loop in loops]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            held = [*tasks, *self._chunks.values(), *self._inputs.values(), *self._fetches.values(), *self._webhooks]
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            await self._fetcher.close()
            async with self.store.write() as connection:
                await leases.release(connection, self.name)

    async def _work(self) -> None:
        """Take what there is room for, then wait until something ends or somebody wakes us."""
        self._woken.clear()
        # What lies here never waits for what is fetched, which takes as long as its server pleases.
        for reading, fetched in ((self._inputs, False), (self._fetches, True)):
            while len(reading) < _INPUTS_AT_A_TIME and (job := await self._claim(fetched=fetched)):
                self._start(reading, job.id, self._read(job))
        while self._has_room() and (taken := await self._take()):
            job, chunk = taken
            task = self._start(self._chunks, chunk.id, self._run(job, chunk))
            if chunk.n_tries > 1:
                self._suspect = task
        await _at_most(_IDLE_SECONDS, self._woken.wait())

    def _has_room(self) -> bool:
        return len(self._chunks) < _CHUNKS_AT_A_TIME and (self._suspect is None or self._suspect.done())

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
        here, now = await identity(self.depot), _now()
        most = _INPUTS_AT_A_TIME // 2  # so that no key's slow servers keep the others' out
        async with self.store.write() as connection:
            return await leases.claim(
                connection, self.name, here, fetched=fetched, most=most, now=now, until=now + self._lease
            )

    async def _take(self) -> tuple[Job, Chunk] | None:
        here, now = await identity(self.depot), _now()
        async with self.store.write() as connection:
            models = sorted(self.state.served())
            taken = await leases.take(connection, self.name, here, models, now=now, until=now + self._lease)
            if taken is not None and taken[1].n_tries > 1 and self._chunks:
                # It runs alone, so that nothing else dies with it: its turn comes when what runs now has ended.
                await connection.rollback()
                return None
            return taken

    async def _read(self, job: Job) -> None:
        """Bring a job's lines to their place, find its chunks, let it run."""
        name, runs = INPUT, False
        try:
            name = await self._place(job)
            async with self.depot.lend(of_job(job.id, name)) as path:
                size = (await asyncio.to_thread(path.stat)).st_size
                spans = await asyncio.to_thread(divide, path, max_lines=self.state.settings.max_job_lines)
                model = job.model or self.state.find(await asyncio.to_thread(model_of, path)).id
            # What was fetched or converted lies here beside what was handed in, and only now its size is known.
            n_more = 0 if name == INPUT else size
            async with self.store.write() as connection:
                if n_more:
                    await check_stored(self.state, connection, job.key_id, n_more)
                runs = await leases.divide(
                    connection,
                    job.id,
                    self.name,
                    model=model,
                    input_name=name,
                    n_bytes=job.n_bytes + n_more,
                    spans=spans,
                    now=_now(),
                )
        except UnavailableError as error:  # the lease lapses, and whoever is free then tries again
            say("job waits", level=logging.WARNING, job=job.id, reason=error.detail)
        except FundamentError as error:
            await self._end(job, f"The input cannot be used. {error.detail}")
        except OSError as error:
            if error.errno in _PASSING:
                say("job waits", level=logging.WARNING, job=job.id, reason=error.strerror)
            else:
                await self._end(job, _reason(error))
        except Exception as error:
            say("unexpected error", level=logging.ERROR, error=error, job=job.id)
            await self._end(job, "An unexpected error occurred while the input was read.")
        finally:
            if name != INPUT and not runs:
                await self.depot.remove(of_job(job.id, name))

    async def _place(self, job: Job) -> str:
        """The name of the file with a job's lines; one of this try's own where they are fetched or converted.

        So whoever comes too late overwrites nothing that others have divided.
        """
        settings, name = self.state.settings, f"lines.{secrets.token_hex(4)}"
        if job.url is not None:
            read_url = buckets.read if buckets.is_listed(job.url, settings.input_buckets) else self._fetcher.read
            async with aclosing(read_url(job.url, max_bytes=int(settings.max_job_mb * 1e6))) as pieces:
                await self.depot.write(of_job(job.id, name), pieces)
            return name
        if job.asked.get("csv"):
            async with self.depot.lend(of_job(job.id, INPUT)) as path:
                await self.depot.write(of_job(job.id, name), on_thread(jsonl(csv_lines(path))))
            return name
        return INPUT

    async def _run(self, job: Job, chunk: Chunk) -> None:
        """Embed a chunk's lines and name the files that hold what became of them."""
        defaults = {"model": job.asked.get("model") or job.model, **job.asked.get("line", {})}
        served = self.state.served()

        def spec_of(name: str) -> ModelSpec | None:
            spec = find(self.state.answering(name), served)
            return spec if spec is not None and spec.id == job.model else None

        toll = Toll(self.state.accounts.limits, job.key_id, NO_LIMITS, chunk.n_admitted)
        try:
            if (key := await self._payer(job)) is not None:
                toll.tier = self.state.accounts.tier_of(key)
            place, span = of_job(job.id, job.input_name or INPUT), chunk.span
            if line := too_long(span):
                lines = [line]
            else:
                raw = await self.depot.read_part(place, start=span.start, n_bytes=span.n_bytes)
                lines = await asyncio.to_thread(read, raw, span.first_line, defaults, spec_of)
            if chunk.n_tries <= _MOST_TRIES:
                found = await embed_lines(self.state, lines, caller=job.key_id, bill=toll)
            elif len(lines) == 1:
                found = [deadly(lines[0])]
            else:
                async with self.store.write() as connection:
                    await leases.split(connection, chunk, self.name, one_by_one(raw, span))
                return
            await self._keep(job, chunk, found)
        except (UnavailableError, LimitError) as error:
            await self._put_off(job, chunk, error, n_admitted=toll.n_admitted)
        except FundamentError as error:
            await self._end(job, error.detail)
        except OSError as error:
            if error.errno in _PASSING:
                await self._put_off(job, chunk, UnavailableError(str(error.strerror)), n_admitted=toll.n_admitted)
            else:
                await self._end(job, _reason(error))
        except Exception as error:
            say("unexpected error", level=logging.ERROR, error=error, job=job.id)
            await self._end(job, "An unexpected error occurred.")

    async def _payer(self, job: Job) -> Key | None:
        """The key that pays for a job; None where no keys are asked for.

        Raises:
            AuthError: it works no more.
            BalanceError: it has nothing left.
        """
        if not job.key_id:
            return None
        async with self.store.read() as connection:
            key = _working(await keys.get(connection, job.key_id))
        if key.balance == 0:
            raise _spent(key)
        return key

    async def _keep(self, job: Job, chunk: Chunk, found: list[Outcome]) -> None:
        """Name the files that hold what became of a chunk and charge its lines, in one transaction.

        Where the key cannot pay for all of them, those that it can pay for in their order are kept, and the job ends.
        """
        failure = None
        while True:
            name = f"{chunk.span.first_line:08d}.{secrets.token_hex(4)}"
            written = await self._write(job.id, name, found)
            async with self.store.write() as connection:
                short = await _pay(connection, job, written)
                kept = short is None and await leases.finish(
                    connection, chunk, self.name, written, now=_now(), failure=failure
                )
                if not kept:
                    await connection.rollback()
            if kept:
                return
            await self._discard(job.id, name)
            if short is None:
                return  # somebody else's by now
            paid = affordable(found, short.balance or 0)
            if len(paid) < len(found):
                found, failure = paid, _spent(short).detail

    async def _put_off(self, job: Job, chunk: Chunk, error: UnavailableError | LimitError, *, n_admitted: int) -> None:
        """Let go of a chunk until what it needs is there; where the store does not answer, its lease lapses."""
        if isinstance(error, UnavailableError):
            say("job waits", level=logging.WARNING, job=job.id, reason=error.detail)
        until = _now() + timedelta(seconds=error.retry_after_seconds or 1)
        try:
            async with self.store.write() as connection:
                await leases.put_off(connection, chunk, self.name, n_admitted=n_admitted, until=until)
        except UnavailableError:
            return
        except Exception as unexpected:
            say("unexpected error", level=logging.ERROR, error=unexpected, job=job.id)

    async def _write(self, job_id: str, name: str, found: list[Outcome]) -> Written:
        n_failed = sum(isinstance(each.answer, FundamentError) for each in found)
        n_tokens = sum(each.n_tokens for each in found)
        n_output = await self.depot.write(of_job(job_id, f"{name}.output"), on_thread(output_lines(found)))
        n_errors = 0
        if n_failed:
            n_errors = await self.depot.write(of_job(job_id, f"{name}.errors"), on_thread(error_lines(found)))
        return Written(
            output=f"{name}.output",
            n_output_bytes=n_output,
            errors=f"{name}.errors" if n_failed else None,
            n_error_bytes=n_errors,
            n_completed=len(found) - n_failed,
            n_failed=n_failed,
            n_tokens=n_tokens,
        )

    async def _discard(self, job_id: str, name: str) -> None:
        for kind in ("output", "errors"):
            await self.depot.remove(of_job(job_id, f"{name}.{kind}"))

    async def _end(self, job: Job, reason: str) -> None:
        try:
            async with self.store.write() as connection:
                ended = await jobs.end(connection, job.id, "failed", now=_now(), error=reason)
        except UnavailableError:
            return  # the lease lapses, and the next one who tries meets the same
        except Exception as error:  # likewise
            say("unexpected error", level=logging.ERROR, error=error, job=job.id)
            return
        if ended is not None:
            say("job failed", level=logging.WARNING, job=job.id, reason=reason)

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self.state.settings.job_lease_seconds)

    async def _keep_leases(self) -> None:
        """Renew what is held; what was lost, or whose job has ended, is given up."""
        await asyncio.sleep(self.state.settings.job_lease_seconds / 4)
        chunks, inputs = dict(self._chunks), self._inputs | self._fetches
        if not chunks and not inputs:
            return
        async with self.store.write() as connection:
            held = await leases.beat(connection, self.name, list(chunks), list(inputs), until=_now() + self._lease)
        for key, task in (chunks | inputs).items():
            if key not in held:
                task.cancel()

    async def _keep_house(self) -> None:
        """Remove what has expired, call the webhooks that are due."""
        async with self.store.write() as connection:
            over, uploads = await jobs.expire(connection, now=_now()), await files.expire(connection, now=_now())
            await jobs.forget(connection, before=_now() - _FORGET_AFTER)
        for name in [*map(of_job, over), *map(of_upload, uploads)]:
            await self.depot.remove(name)
        while len(self._webhooks) < _WEBHOOKS_AT_A_TIME and (job := await self._due()):
            task = asyncio.create_task(self._call(job))
            self._webhooks[task] = job.key_id
            task.add_done_callback(self._called)
        await asyncio.sleep(_IDLE_SECONDS)

    async def _sweep(self) -> None:
        """Remove what a killed process left behind: bytes that no row knows, unless another store's may."""
        settings = self.state.settings
        here = name_of(settings.store_url, settings.data_dir, shared=bool(settings.files_url)).encode()
        if (owner := await self.depot.claim(OWNER, here)) != here:
            say(
                f"jobs' files here are another store's, so nothing is removed; if they are this one's, remove {OWNER}",
                level=logging.WARNING,
                store=here.decode(),
                owner=owner.decode(errors="replace"),
            )
            await asyncio.sleep(_STRAY_SECONDS)
            return
        old_jobs = await self.depot.old("jobs", seconds=_STRAY_SECONDS)
        old_files = await self.depot.old("files", seconds=_STRAY_SECONDS)
        async with self.store.read() as connection:
            kept = await jobs.kept(connection, old_jobs) | await files.kept(connection, old_files)
            n_elsewhere = await jobs.elsewhere(connection, await identity(self.depot))
        if n_elsewhere:
            say("jobs wait for a worker with their files", level=logging.WARNING, jobs=n_elsewhere)
        for name in [*map(of_job, set(old_jobs) - kept), *map(of_upload, set(old_files) - kept)]:
            await self.depot.remove(name)
        await asyncio.sleep(_STRAY_SECONDS)

    async def _due(self) -> Job | None:
        here = await identity(self.depot)
        async with self.store.write() as connection:
            at_once = Counter(key_id for key_id in self._webhooks.values() if key_id)
            busy = [key_id for key_id, n in at_once.items() if n >= _WEBHOOKS_OF_A_KEY]
            return await jobs.call(connection, here, DELAYS, now=_now(), but_for=busy)

    def _called(self, task: asyncio.Task[None]) -> None:
        del self._webhooks[task]
        if not task.cancelled() and (error := task.exception()) is not None:  # it is due again later
            say_rarely("webhook not called", reason=error)

    async def _call(self, job: Job) -> None:
        assert job.webhook_url is not None
        assert job.outcome is not None
        assert job.ended_at is not None
        # What is told is what happened, however late it is heard: the job as it ended, expired or not by now.
        then = replace(job, state=job.outcome, webhook_url=None)
        told = {
            "type": f"batch.{job.outcome}",
            "timestamp": job.ended_at.isoformat(),
            "data": await describe(self.state, then),
        }
        reason = await deliver(
            self._fetcher,
            job.webhook_url,
            json_bytes(told),
            secret=await message_secret(self.state),
            message_id=f"{job.id}.{job.outcome}",
            now=_now(),
        )
        state: jobs.Called = "pending"
        if reason is None or job.webhook_attempts > len(DELAYS):
            state = "delivered" if reason is None else "failed"
        async with self.store.write() as connection:
            await jobs.called(connection, job.id, state, reason)


async def _pay(connection: AsyncConnection, job: Job, written: Written) -> Key | None:
    """Charge a chunk's lines in the transaction that makes them count, so that each is paid once.

    Returns:
        None where that is done; otherwise the key, whose balance does not suffice, and nothing is taken.

    Raises:
        AuthError: the key works no more.
    """
    if job.key_id:
        key = _working(await keys.get(connection, job.key_id, locked=True))
        if key.balance is not None and not await keys.spend(connection, key.id, written.n_tokens):
            return key
    line = Line(job.key_id, _now().date(), job.model or "", "/v1/batch/embeddings")
    await usage.add(connection, {line: (written.n_completed, written.n_tokens)})
    return None


def _working(key: Key | None) -> Key:
    if key is None or key.state(_now()) != "active":
        raise AuthError("AUTH_INVALID_API_KEY", "The job's key was revoked or has expired.")
    return key


def _spent(key: Key) -> BalanceError:
    return BalanceError(
        "Insufficient account balance: the job's next line needs more tokens than are left. What was written is kept. "
        f"Top it up: fundament keys credit {key.id} TOKENS"
    )


async def _forever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do something again and again; a store that does not answer is waited for."""
    waits = False
    while True:
        try:
            await work()
            waits = False
        except UnavailableError as error:
            if not waits:
                say("jobs wait for the store", level=logging.WARNING, reason=error.detail)
            waits = True
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


def _reason(error: OSError) -> str:
    why = os.strerror(error.errno) if error.errno else str(error)
    return f"The job's files cannot be written or read: {why}. What was written is kept."


def _now() -> datetime:
    return datetime.now(UTC)
