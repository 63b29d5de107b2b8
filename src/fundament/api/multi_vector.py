"""`POST /v1/multi-vector` and `/v1/multi-embeddings`: `/v1/embeddings` with one vector per token."""

from typing import Any

from fastapi import APIRouter, Request, Response

from fundament.api.answers import EmbeddingResponse
from fundament.api.body import read_body
from fundament.api.embeddings import EmbeddingsRequest, answer_embeddings
from fundament.api.routes import PlainRoute
from fundament.api.schemas import request_body, responses

router = APIRouter(tags=["Search Foundation Models"], route_class=PlainRoute)

_DOCUMENTED: dict[str, Any] = {
    "openapi_extra": request_body(EmbeddingsRequest),
    "responses": responses(EmbeddingResponse),
}


@router.post("/v1/multi-vector", summary="One vector per token", **_DOCUMENTED)
@router.post("/v1/multi-embeddings", summary="One vector per token (older name)", **_DOCUMENTED)
async def multi_vector(request: Request) -> Response:
    """Turn texts into one vector per token: `return_multivector` is implied."""
    asked = await read_body(request, EmbeddingsRequest)
    return await answer_embeddings(request, asked.model_copy(update={"return_multivector": True}))
