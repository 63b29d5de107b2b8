"""`GET /v1/models` and `/v1/models/{id}`: what is served here."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from fundament.api.schemas import OrAbsent, responses
from fundament.api.state import State, state_of
from fundament.api.wire import answer
from fundament.catalog import ModelSpec
from fundament.errors import ModelNotFoundError, NotFoundError

router = APIRouter(tags=["Model List"])

_SAMPLING = ["temperature", "top_p", "seed", "stop", "max_tokens"]
_FREE = dict.fromkeys(("prompt", "completion", "image", "request", "input_cache_read", "input_cache_write"), "0")


class ModelPricing(BaseModel):
    """Prices per token; everything is free on your own hardware."""

    prompt: str
    completion: str
    image: str
    request: str
    input_cache_read: str
    input_cache_write: str


class ModelInfo(BaseModel):
    """A served model: OpenRouter's fields, then those of OpenAI's list and of the older local reference."""

    id: str
    hugging_face_id: str
    name: str
    created: int
    input_modalities: list[str]
    output_modalities: list[str]
    quantization: str
    context_length: int
    max_output_length: int
    pricing: ModelPricing
    supported_sampling_parameters: list[str]
    supported_features: list[str]
    description: str
    datacenters: list[dict[str, str]]
    object: str
    owned_by: str
    type: str
    max_tokens: int
    dimensions: int | None
    supports_multimodal: bool
    tasks: list[str] | None
    licence: str
    score: str | None
    alias_of: OrAbsent[str] = None


class ModelListResponse(BaseModel):
    """The served models."""

    object: str
    data: list[ModelInfo]


def describe(spec: ModelSpec) -> dict[str, Any]:
    """A model in the fields of the 2026 specification, then those of OpenAI's list and of the older local reference."""
    return {
        "id": spec.id,
        "hugging_face_id": spec.repo,
        "name": spec.name,
        "created": spec.created,
        "input_modalities": list(spec.modalities),
        "output_modalities": ["text"] if spec.kind == "chat" else ["embeddings"],
        "quantization": "",
        "context_length": spec.context,
        "max_output_length": spec.context if spec.kind == "chat" else spec.dim,
        "pricing": _FREE,
        "supported_sampling_parameters": _SAMPLING if spec.kind == "chat" else [],
        "supported_features": [],
        "description": spec.description,
        "datacenters": [],
        "object": "model",
        "owned_by": spec.owner,
        "type": spec.kind,
        "max_tokens": spec.context,
        "dimensions": spec.dim or None,
        "supports_multimodal": len(spec.modalities) > 1,
        "tasks": list(spec.tasks) or None,
        "licence": spec.licence,
        "score": spec.score,
    }


@router.get("/v1/models", summary="List models", responses=responses(ModelListResponse, errors=(500,)))
@router.head("/v1/models", include_in_schema=False)
async def models(request: Request) -> Response:
    """Every model that may be named in a request; an alias is an entry of its own that says what it stands for."""
    state = state_of(request)
    names = sorted({*state.served(), *state.aliases})
    return answer({"object": "list", "data": [_named(state, name) for name in names]})


@router.get("/v1/models/{model_id:path}", summary="Get a model", responses=responses(ModelInfo, errors=(404, 500)))
async def model(request: Request, model_id: str) -> Response:
    """One model, by its short id, its long one (`jina-ai/jina-embeddings-v3`) or an alias."""
    state = state_of(request)
    try:
        return answer(_named(state, model_id))
    except ModelNotFoundError as error:
        raise NotFoundError(
            f"Model '{model_id}' not found or access denied. Available models: {state.listed()}."
        ) from error


def _named(state: State, model: str) -> dict[str, Any]:
    """The model that a name stands for; an alias keeps its name."""
    described, alias = describe(state.find(model)), state.alias(model)
    return described | {"id": alias, "alias_of": str(state.aliases[alias])} if alias else described
