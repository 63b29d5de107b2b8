"""From a job's input to its chunks: lines are brought to their place, counted and divided."""

import asyncio
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime

from fundament import buckets
from fundament.api.jobs.chunks import check_lines, divide
from fundament.api.jobs.lines import model_of
from fundament.api.jobs.queue import check_stored
from fundament.api.state import State
from fundament.depot import INPUT, of_job, on_thread
from fundament.errors import FundamentError, UnavailableError
from fundament.fetching import Fetcher
from fundament.jsonl import InputFileError, csv_lines, jsonl
from fundament.store import leases
from fundament.store.jobs import Job
from fundament.telemetry import say
from fundament.worker.failures import fail, is_passing, reason_of


async def read_input(state: State, worker: str, job: Job, fetcher: Fetcher) -> None:
    """Bring a job's lines to their place, find its chunks, let it run.

    Args:
        state: the application's parts.
        worker: the name of the one that holds the input.
        job: whose input it is.
        fetcher: reads it where it is at a URL.
    """
    name, runs = INPUT, False
    try:
        name = await _place(state, job, fetcher)
        async with state.depot.lend(of_job(job.id, name)) as path:
            size = (await asyncio.to_thread(path.stat)).st_size
            spans = await asyncio.to_thread(divide, path, max_lines=state.settings.max_job_lines)
            model = job.model or state.find(await asyncio.to_thread(model_of, path)).id
        # What was fetched or converted lies here beside what was handed in, and only now its size is known.
        n_more = 0 if name == INPUT else size
        async with state.store.write() as connection:
            if n_more:
                await check_stored(state, connection, job.key_id, n_more)
            runs = await leases.divide(
                connection,
                job.id,
                worker,
                model=model,
                input_name=name,
                n_bytes=job.n_bytes + n_more,
                spans=spans,
                now=datetime.now(UTC),
            )
    except UnavailableError as error:  # the lease lapses, and whoever is free then tries again
        say("job waits", level=logging.WARNING, job=job.id, reason=error.detail)
    except FundamentError as error:
        await fail(state, job, f"The input cannot be used. {error.detail}")
    except OSError as error:
        if is_passing(error):
            say("job waits", level=logging.WARNING, job=job.id, reason=error.strerror)
        else:
            await fail(state, job, reason_of(error))
    except Exception as error:
        say("unexpected error", level=logging.ERROR, error=error, job=job.id)
        await fail(state, job, "An unexpected error occurred while the input was read.")
    finally:
        if name != INPUT and not runs:
            await state.depot.remove(of_job(job.id, name))


async def _place(state: State, job: Job, fetcher: Fetcher) -> str:
    """The name of the file with a job's lines; one of this try's own where they are fetched or converted.

    So whoever comes too late overwrites nothing that others have divided.
    """
    settings, depot, name = state.settings, state.depot, f"lines.{secrets.token_hex(4)}"
    if job.url is not None:
        read_url = buckets.read if buckets.is_listed(job.url, settings.input_buckets) else fetcher.read
        async with aclosing(read_url(job.url, max_bytes=int(settings.max_job_mb * 1e6))) as pieces:
            await depot.write(of_job(job.id, name), pieces)
        return name
    if job.asked.get("csv"):
        async with depot.lend(of_job(job.id, INPUT)) as path:
            lines = bounded(jsonl(csv_lines(path)), settings.max_job_lines, int(settings.max_job_mb * 1e6))
            await depot.write(of_job(job.id, name), on_thread(lines))
        return name
    return INPUT


def bounded(lines: Iterable[bytes], most: int, most_bytes: int) -> Iterator[bytes]:
    """Lines as long as a job may have them: in JSONL a row is longer than in CSV, one of two bytes seven times.

    Raises:
        InputFileError: there are more than `most`, or than `most_bytes` of them.
    """
    n_bytes = 0
    for n, line in enumerate(lines, start=1):
        check_lines(n, most)
        if (n_bytes := n_bytes + len(line)) > most_bytes:
            told = f"more than {most_bytes / 1e6:g} MB as JSONL"
            raise InputFileError(f"The input has {told}. Divide it into several jobs.")
        yield line
