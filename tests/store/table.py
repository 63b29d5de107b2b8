"""Jobs in a store, and workers that take them."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from fundament.store import jobs, leases
from fundament.store.database import Database
from fundament.store.jobs import Job
from fundament.store.leases import Chunk, Span, Written

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
LEASE = timedelta(seconds=20)
SOON, LATER = NOW + LEASE / 2, NOW + LEASE * 2
DONE = Written(output="out", n_output_bytes=10, errors="err", n_error_bytes=5, n_completed=2, n_failed=1, n_tokens=7)


class Table:
    """Jobs in a store."""

    def __init__(self, store: Database, runner: asyncio.Runner) -> None:
        self.store, self.runner = store, runner

    def do(self, work: Any, *args: Any, **options: Any) -> Any:
        async def run() -> Any:
            async with self.store.write() as connection:
                return await work(connection, *args, **options)

        return self.runner.run(run())

    def add(self, job_id: str = "batch_1", key_id: str = "", at: datetime = NOW, **options: Any) -> Job:
        job: Job = self.do(
            jobs.create,
            job_id,
            key_id=key_id,
            depot="here",
            dialect="batch",
            model="m",
            asked={"model": "m"},
            n_bytes=100,
            now=at,
            expires_at=at + timedelta(hours=24),
            **options,
        )
        return job

    def claim(
        self, worker: str, at: datetime = NOW, *, depot: str = "here", fetched: bool = False, most: int = 4
    ) -> str | None:
        job = self.do(leases.claim, worker, depot, fetched=fetched, most=most, now=at, until=at + LEASE)
        return None if job is None else job.id

    def running(self, job_id: str = "batch_1", n_chunks: int = 2, **options: Any) -> None:
        """A job that runs."""
        self.add(job_id, **options)
        assert self.claim("reader") == job_id
        spans = [Span(start=30 * n, n_bytes=30, first_line=3 * n, n_lines=3) for n in range(n_chunks)]
        assert self.do(leases.divide, job_id, "reader", model="m", n_bytes=60, spans=spans, now=NOW)

    def take(
        self, worker: str, at: datetime = NOW, *, depot: str = "here", models: tuple[str, ...] = ("m",)
    ) -> Chunk | None:
        taken = self.do(leases.take, worker, depot, models, now=at, until=at + LEASE)
        return None if taken is None else taken[1]

    def finish(self, chunk: Chunk, worker: str) -> bool:
        return bool(self.do(leases.finish, chunk, worker, DONE, now=SOON))

    def get(self, job_id: str = "batch_1") -> Job:
        job: Job = self.do(jobs.get, job_id)
        return job
