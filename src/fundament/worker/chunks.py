"""From a chunk's lines to what became of them: run through the API's own verb, written, named and paid."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.accounts.toll import Toll
from fundament.accounts.visits import NO_LIMITS
from fundament.api.jobs.chunks import one_by_one
from fundament.api.jobs.lines import read, too_long
from fundament.api.jobs.outcomes import Outcome, affordable, deadly, embed_lines, error_lines, output_lines
from fundament.api.state import State
from fundament.catalog import ModelSpec, find
from fundament.depot import INPUT, Depot, of_job, on_thread
from fundament.errors import AuthError, BalanceError, FundamentError, LimitError, UnavailableError
from fundament.store import keys, leases, usage
from fundament.store.jobs import Job
from fundament.store.keys import Key
from fundament.store.leases import Chunk, Written
from fundament.store.usage import Line
from fundament.telemetry import say
from fundament.worker.failures import fail, is_passing, reason_of

_AGAIN_SECONDS = 1.0  # between tries to tell a store that does not answer
_MOST_TRIES = 3  # of a chunk over which workers die; then its lines are tried one by one, and of a line then


async def run_chunk(state: State, worker: str, job: Job, chunk: Chunk) -> None:
    """Embed a chunk's lines and name the files that hold what became of them.

    Args:
        state: the application's parts.
        worker: the name of the one that holds the chunk.
        job: whose chunk it is.
        chunk: which lines.
    """
    asked = job.asked
    defaults = {"model": asked.get("model") or job.model, "truncate": asked.get("truncate"), **asked.get("line", {})}
    served = state.served()

    def spec_of(name: str) -> ModelSpec | None:
        spec = find(state.answering(name), served)
        return spec if spec is not None and spec.id == job.model else None

    toll = Toll(state.accounts.limits, job.key_id, NO_LIMITS, chunk.n_admitted)
    try:
        if (key := await _payer(state, job)) is not None:
            toll.tier = state.accounts.tier_of(key)
        place, span = of_job(job.id, job.input_name or INPUT), chunk.span
        if line := too_long(span):
            lines = [line]
        else:
            raw = await state.depot.read_part(place, start=span.start, n_bytes=span.n_bytes)
            lines = await asyncio.to_thread(read, raw, span.first_line, defaults, spec_of)
        if chunk.n_tries <= _MOST_TRIES:
            found = await embed_lines(state, lines, caller=job.key_id, bill=toll)
        elif len(lines) == 1:
            found = [deadly(lines[0])]
        else:
            async with state.store.write() as connection:
                await leases.split(connection, chunk, worker, one_by_one(raw, span))
            return
        await _keep(state, worker, job, chunk, found)
    except (UnavailableError, LimitError) as error:
        await _put_off(state, worker, chunk, error, n_admitted=toll.n_admitted)
    except FundamentError as error:
        await fail(state, job, error.detail, held=(chunk, worker))
    except OSError as error:
        if is_passing(error):
            await _put_off(state, worker, chunk, UnavailableError(str(error.strerror)), n_admitted=toll.n_admitted)
        else:
            await fail(state, job, reason_of(error), held=(chunk, worker))
    except Exception as error:
        say("unexpected error", level=logging.ERROR, error=error, job=job.id)
        await fail(state, job, "An unexpected error occurred.", held=(chunk, worker))


async def _payer(state: State, job: Job) -> Key | None:
    """The key that pays for a job; None where no keys are asked for.

    Raises:
        AuthError: it works no more.
        BalanceError: it has nothing left.
    """
    if not job.key_id:
        return None
    async with state.store.read() as connection:
        key = _working(await keys.get(connection, job.key_id))
    if key.balance == 0:
        raise _spent(key)
    return key


async def _keep(state: State, worker: str, job: Job, chunk: Chunk, found: Sequence[Outcome]) -> None:
    """Name the files that hold what became of a chunk and charge its lines, in one transaction.

    Where the key cannot pay for all of them, those that it can pay for in their order are kept, and the job ends.
    """
    failure = None
    while True:
        name = f"{chunk.span.first_line:08d}.{secrets.token_hex(4)}"
        written = await _write(state.depot, job.id, name, found)
        async with state.store.write() as connection:
            short = await _pay(connection, job, written)
            kept = short is None and await leases.finish(
                connection, chunk, worker, written, now=datetime.now(UTC), failure=failure
            )
            if not kept:
                await connection.rollback()
        if kept:
            return
        for kind in ("output", "errors"):
            await state.depot.remove(of_job(job.id, f"{name}.{kind}"))
        if short is None:
            return  # somebody else's by now
        paid = affordable(found, short.balance or 0)
        if len(paid) < len(found):
            found, failure = paid, _spent(short).detail


async def _write(depot: Depot, job_id: str, name: str, found: Sequence[Outcome]) -> Written:
    n_failed = sum(isinstance(each.answer, FundamentError) for each in found)
    n_tokens = sum(each.n_tokens for each in found)
    n_output = await depot.write(of_job(job_id, f"{name}.output"), on_thread(output_lines(found)))
    n_errors = 0
    if n_failed:
        n_errors = await depot.write(of_job(job_id, f"{name}.errors"), on_thread(error_lines(found)))
    return Written(
        output=f"{name}.output",
        n_output_bytes=n_output,
        errors=f"{name}.errors" if n_failed else None,
        n_error_bytes=n_errors,
        n_completed=len(found) - n_failed,
        n_failed=n_failed,
        n_tokens=n_tokens,
    )


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
    line = Line(job.key_id, datetime.now(UTC).date(), job.model or "", "/v1/batch/embeddings")
    await usage.add(connection, {line: (written.n_completed, written.n_tokens)})
    return None


async def _put_off(
    state: State, worker: str, chunk: Chunk, error: UnavailableError | LimitError, *, n_admitted: int
) -> None:
    """Let go of a chunk until what it needs is there.

    A lease that lapses counts as a worker's death. So a store that does not answer is waited for; where a model has
    died, over this chunk perhaps, the lease is left to lapse.
    """
    if state.death() is not None:
        return
    if isinstance(error, UnavailableError):
        say("job waits", level=logging.WARNING, job=chunk.job_id, reason=error.detail)
    while True:
        until = datetime.now(UTC) + timedelta(seconds=error.retry_after_seconds or 1)
        try:
            async with state.store.write() as connection:
                await leases.put_off(connection, chunk, worker, n_admitted=n_admitted, until=until)
        except UnavailableError:
            await asyncio.sleep(_AGAIN_SECONDS)
        except Exception as unexpected:
            say("unexpected error", level=logging.ERROR, error=unexpected, job=chunk.job_id)
            return
        else:
            return


def _working(key: Key | None) -> Key:
    if key is None or key.state(datetime.now(UTC)) != "active":
        raise AuthError("AUTH_INVALID_API_KEY", "The job's key was revoked or has expired.")
    return key


def _spent(key: Key) -> BalanceError:
    return BalanceError(
        "Insufficient account balance: the job's next line needs more tokens than are left. What was written is kept. "
        f"Top it up: fundament keys credit {key.id} TOKENS"
    )
