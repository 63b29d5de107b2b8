"""What ends a job as failed, and what only makes it wait."""

import errno
import logging
from datetime import UTC, datetime

from fundament.api.state import State
from fundament.errors import UnavailableError, why
from fundament.store import jobs, leases
from fundament.store.jobs import Job
from fundament.store.leases import Chunk
from fundament.telemetry import say

_PASSING = (errno.EMFILE, errno.ENFILE)  # connections take files too, and end


def is_passing(error: OSError) -> bool:
    """Whether it goes away by itself."""
    return error.errno in _PASSING


def reason_of(error: OSError) -> str:
    """A sentence for the job's owner."""
    return f"The job's files cannot be written or read: {why(error)}. What was written is kept."


async def fail(state: State, job: Job, reason: str, *, held: tuple[Chunk, str] | None = None) -> None:
    """End a job as failed; where the store does not answer, its lease lapses and who tries next meets the same.

    Args:
        state: the application's parts.
        job: which one.
        reason: a sentence for its owner.
        held: the chunk over which it fails and the worker that has it: one that has lost it ends nothing.
    """
    try:
        async with state.store.write() as connection:
            if held is not None and not await leases.holds(connection, *held):
                return
            ended = await jobs.end(connection, job.id, "failed", now=datetime.now(UTC), error=reason)
    except UnavailableError:
        return
    except Exception as error:
        say("unexpected error", level=logging.ERROR, error=error, job=job.id)
        return
    if ended is not None:
        say("job failed", level=logging.WARNING, job=job.id, reason=reason)
