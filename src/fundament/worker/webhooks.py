"""Webhooks of jobs that have ended: which are due, a few of them called at a time."""

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

from fundament.api.jobs.batch import describe
from fundament.api.jobs.signatures import message_secret
from fundament.api.state import State
from fundament.api.wire import json_bytes
from fundament.depot import identity
from fundament.fetching import Fetcher
from fundament.store import jobs
from fundament.store.jobs import Job
from fundament.telemetry import say_rarely
from fundament.webhooks import DELAYS, deliver

_AT_A_TIME, _OF_A_KEY = 8, 2


class Webhooks:
    """The webhooks that are being called.

    Args:
        state: the application's parts.
        fetcher: calls them.
    """

    def __init__(self, state: State, fetcher: Fetcher) -> None:
        self._state, self._fetcher = state, fetcher
        self.tasks: dict[asyncio.Task[None], str] = {}  # each with whose job it tells of

    async def call_due(self) -> None:
        """Begin with those that are due, as many as there is room for."""
        while len(self.tasks) < _AT_A_TIME and (job := await self._take()):
            task = asyncio.create_task(self._call(job))
            self.tasks[task] = job.key_id
            task.add_done_callback(self._called)

    async def _take(self) -> Job | None:
        here = await identity(self._state.depot)
        async with self._state.store.write() as connection:
            at_once = Counter(key_id for key_id in self.tasks.values() if key_id)
            busy = [key_id for key_id, n in at_once.items() if n >= _OF_A_KEY]
            return await jobs.call(connection, here, DELAYS, now=datetime.now(UTC), but_for=busy)

    async def _call(self, job: Job) -> None:
        assert job.webhook_url is not None
        assert job.ended_at is not None
        # What is told is what happened, however late it is heard: the job as it ended, expired or not by now. Its
        # files are linked while they are there.
        outcome = job.outcome or job.state
        data = await describe(self._state, replace(job, state=outcome, webhook_url=None))
        if job.state == "expired":
            data |= {"output_url": None, "error_file_url": None}
        told = {"type": f"batch.{outcome}", "timestamp": job.ended_at.isoformat(), "data": data}
        reason = await deliver(
            self._fetcher,
            job.webhook_url,
            json_bytes(told),
            secret=await message_secret(self._state),
            message_id=f"{job.id}.{outcome}",
            now=datetime.now(UTC),
        )
        state: jobs.Called = "pending"
        if reason is None or job.webhook_attempts > len(DELAYS):
            state = "delivered" if reason is None else "failed"
        async with self._state.store.write() as connection:
            await jobs.called(connection, job.id, state, reason)

    def _called(self, task: asyncio.Task[None]) -> None:
        del self.tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:  # it is due again later
            say_rarely("webhook not called", reason=error)
