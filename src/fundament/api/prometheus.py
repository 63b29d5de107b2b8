"""`GET /metrics`: what the server counts, for Prometheus."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from fundament.api.state import state_of

router = APIRouter(tags=["Administration"])


@router.get("/metrics", summary="Metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counters and timings in Prometheus' text format."""
    return Response(state_of(request).metrics.page(), media_type="text/plain; version=0.0.4")
