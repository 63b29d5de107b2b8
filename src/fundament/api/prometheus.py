"""`GET /metrics`: what the server counts, for Prometheus."""

from asyncio import timeout
from contextlib import suppress

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from fundament.api.state import state_of
from fundament.errors import UnavailableError
from fundament.store import jobs

router = APIRouter(tags=["Administration"])

_STORE_SECONDS = 2.0  # less than Prometheus waits for the page


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and timings in Prometheus' text format. Those of jobs are left out while the store does not answer."""
    state = state_of(request)
    shown = state.metrics
    shown.jobs.clear()
    shown.job_lines.clear()
    with suppress(UnavailableError, TimeoutError):
        async with timeout(_STORE_SECONDS), state.store.read() as connection:
            backlog = await jobs.backlog(connection)
        for name, (n_jobs, n_lines) in backlog.items():
            shown.jobs.labels(name).set(n_jobs)
            shown.job_lines.labels(name).set(n_lines)
    return Response(shown.page(), media_type="text/plain; version=0.0.4")
