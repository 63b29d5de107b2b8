"""What is removed: jobs and uploads whose time is over, and bytes that no row knows."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from fundament.api.state import State
from fundament.depot import OWNER, identity, of_job, of_upload
from fundament.store import files, jobs
from fundament.store.database import name_of
from fundament.telemetry import say

_STRAY_SECONDS = 3600.0  # an upload may take as long before a row knows it
_FORGET_AFTER = timedelta(days=30)


async def expire(state: State) -> None:
    """Remove what has expired."""
    async with state.store.write() as connection:
        now = datetime.now(UTC)
        over, uploads = await jobs.expire(connection, now=now), await files.expire(connection, now=now)
        await jobs.forget(connection, before=now - _FORGET_AFTER)
    for name in [*map(of_job, over), *map(of_upload, uploads)]:
        await state.depot.remove(name)


async def sweep(state: State) -> None:
    """Remove what a killed process left behind: bytes that no row knows, unless another store's may. Then rest."""
    depot, settings = state.depot, state.settings
    here = name_of(settings.store_url, settings.data_dir, shared=bool(settings.files_url)).encode()
    if (owner := await depot.claim(OWNER, here)) != here:
        say(
            f"jobs' files here are another store's, so nothing is removed; if they are this one's, remove {OWNER}",
            level=logging.WARNING,
            store=here.decode(),
            owner=owner.decode(errors="replace"),
        )
        await asyncio.sleep(_STRAY_SECONDS)
        return
    old_jobs = await depot.old("jobs", seconds=_STRAY_SECONDS)
    old_files = await depot.old("files", seconds=_STRAY_SECONDS)
    async with state.store.read() as connection:
        kept = await jobs.kept(connection, old_jobs) | await files.kept(connection, old_files)
        n_elsewhere = await jobs.elsewhere(connection, await identity(depot))
    if n_elsewhere:
        say("jobs wait for a worker with their files", level=logging.WARNING, jobs=n_elsewhere)
    for name in [*map(of_job, set(old_jobs) - kept), *map(of_upload, set(old_files) - kept)]:
        await depot.remove(name)
    await asyncio.sleep(_STRAY_SECONDS)
