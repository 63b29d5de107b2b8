"""Health: `/live`, `/health`, `/healthz` and `/` say that the process answers, `/ready` that the models do.

Each answers HEAD too, which load balancers probe with.
"""

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from fundament.api.errors import render
from fundament.api.schemas import responses
from fundament.api.state import state_of
from fundament.api.wire import answer
from fundament.errors import UnavailableError

router = APIRouter(tags=["Health Check"])


class Status(BaseModel):
    """How the process is."""

    status: str


@router.get("/", include_in_schema=False)
@router.get("/live", summary="Live", responses=responses(Status, errors=()))
@router.get("/health", summary="Health", responses=responses(Status, errors=()))
@router.get("/healthz", summary="Health", responses=responses(Status, errors=()))
@router.head("/", include_in_schema=False)
@router.head("/live", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.head("/healthz", include_in_schema=False)
async def alive() -> Response:
    """The process is alive; nothing else is looked at."""
    return answer({"status": "ok"})


@router.get("/ready", summary="Ready", responses=responses(Status, errors=(503,)))
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> Response:
    """Whether the models asked for at start can answer; 503 with the reason while they cannot."""
    state = state_of(request)
    reason = "The server is closing." if state.closing else state.not_ready()
    if reason is not None:
        return render(UnavailableError(reason, retry_after_seconds=1), request.state.request_id)
    return answer({"status": "ready"})
