"""`POST /v1/rerank`: a query and documents in; out come the documents in the order of their relevance."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, cast

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, StringConstraints, ValidationInfo

from fundament.api.body import Body, ModelName, echo, read_body
from fundament.api.inputs import ImageDoc, Part, Reference, TextDoc, check_number, check_some, read_part
from fundament.api.media import opened, read_bare_input
from fundament.api.presence import while_awaited
from fundament.api.routes import PlainRoute
from fundament.api.schemas import BaseUsage, OrAbsent, request_body, responses
from fundament.api.similarity import rank_by_vectors
from fundament.api.state import State, state_of
from fundament.api.wire import can_write, long_answer, written
from fundament.catalog import ModelSpec
from fundament.config import Settings
from fundament.core import Media, Output, Ranking, Rerank
from fundament.errors import Fault, InputError

router = APIRouter(route_class=PlainRoute)

DEFAULT = "jina-reranker-v3"  # what a request means that names no model, where it is served
_MOST_TOKENS = 8192  # of `max_doc_length`, as the public API has it
_Content = str | TextDoc | ImageDoc


@dataclass(frozen=True, slots=True)
class Document:
    """A document, or the query, as it was sent, and what is read of it. An answer repeats documents."""

    sent: Any
    content: Part


def read_content(value: Any, origin: str) -> Part:
    """What is to be read of a string or an object: its `text`, else its image or other medium.

    Raises:
        InputError: it is neither, or has nothing to read.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        message = 'Input should be a string or an object like {"text": "…"}.'
        raise InputError(Fault(origin, message, "string_type", echo(value)))
    # Beside a text all other keys are the caller's own, `url` among them. An answer repeats them.
    if any(isinstance(kept, dict | list) for kept in value.values()) and not can_write([[[value]]]):
        raise InputError(Fault(origin, "It is nested too deeply to be repeated in an answer.", "value_error"))
    return read_part({"text": value["text"]} if value.get("text") is not None else value, origin)


def _read_query(value: Any) -> Document:
    return Document(value, read_content(value, "body -> query"))


def _read_documents(value: Any, info: ValidationInfo[Settings | None]) -> list[Document]:
    field = "body -> documents"
    if not isinstance(value, list):
        raise InputError(Fault(field, "Input should be a list of documents.", "list_type", echo(value)))
    check_some(value, field)
    if info.context is not None:  # before millions are looked at one by one
        check_number(value, info.context.max_inputs, field)
    return [Document(sent, read_content(sent, f"{field} -> {place}")) for place, sent in enumerate(value)]


class RerankRequest(Body):
    """Fields of no model are ignored, as the hosted API does; those of other models and wrong values are refused."""

    model: ModelName | None = Field(
        None,
        description=f"The model's id, short or long. Left out: `{DEFAULT}` where it is served, else the only reranker, "
        "else the only model that can rank.",
        examples=["all-minilm-l6-v2"],
    )
    query: Annotated[
        Document,
        BeforeValidator(_read_query, json_schema_input_type=_Content),
    ] = Field(description="What is searched for.")
    documents: Annotated[
        list[Document],
        BeforeValidator(_read_documents, json_schema_input_type=Annotated[list[_Content], Field(min_length=1)]),
    ] = Field(
        description='What is ranked: strings, or objects like `{"text": …}`, whose other keys are kept. '
        'Models that read images also take `{"image": …}`, here and as the query.',
    )
    top_n: Annotated[int, Field(ge=1)] | None = Field(
        None,
        validation_alias=AliasChoices("top_n", "top_k"),
        description="Answer with the best so many only. Also read as `top_k`.",
    )
    return_documents: bool | None = Field(True, description="Repeat each document in its result.")
    truncation: bool | None = Field(
        True,
        validation_alias=AliasChoices("truncation", "truncate"),
        description="Cut what is longer than the model reads; `false` refuses it. Also read as `truncate`.",
    )
    max_doc_length: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = Field(
        None,
        validation_alias=AliasChoices("max_doc_length", "max_tokens_per_doc"),
        description="Read so many tokens of each document at most. Also read as `max_tokens_per_doc`.",
    )
    max_query_length: Annotated[int, Field(ge=1, le=_MOST_TOKENS)] | None = Field(
        None, description="Read so many tokens of the query at most."
    )
    instruction: Annotated[str, StringConstraints(max_length=2_000)] | None = Field(
        None, description="What relevance means, in words (jina-reranker-v3, Qwen3)."
    )
    return_embeddings: bool | None = Field(None, description="Add each document's vector (jina-reranker-v3).")
    rank_fields: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        None, description="Cohere's: nothing else than `text` is read."
    )
    return_multivector: bool | None = Field(
        None, description="Score by vectors per token, on an embedding model that gives them too (bge-m3)."
    )
    return_sparse: bool | None = Field(
        None, description="Score by weights of tokens, on an embedding model that gives them too (bge-m3)."
    )


class RerankingResult(BaseModel):
    """One document's score."""

    index: int
    relevance_score: float
    document: OrAbsent[str | dict[str, Any]] = None
    embedding: OrAbsent[list[float]] = None


class RerankingResponse(BaseModel):
    """Documents, the most relevant first."""

    model: str
    object: str
    usage: BaseUsage
    results: list[RerankingResult]


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """What the verb answers, before it is written.

    Attributes:
        model: as the caller named it.
        ranking: of all documents, in the caller's order.
        order: places of the documents that are answered with, the most relevant first.
        scores: of all documents, rounded as they are written.
        documents: as they are repeated, in the caller's order; None where they are not.
    """

    model: str
    ranking: Ranking
    order: list[int]
    scores: list[float]
    documents: list[Any] | None


async def rerank(state: State, request: RerankRequest) -> RerankAnswer:
    """Check what the model takes, score the documents, put them in order.

    Raises:
        FundamentError: a model that is not served or cannot rank, a field that it does not take, a text too long.
    """
    spec = _default(state) if request.model is None else state.find(request.model)
    _check(state, spec, request)
    fields = ["body -> query", *(f"body -> documents -> {place}" for place in range(len(request.documents)))]
    each = zip((request.query, *request.documents), fields, strict=True)
    sent = [_readable(state, spec, document, field) for document, field in each]
    async with opened(state, sent, "body") as inputs:
        query, *documents = cast("list[str | Media]", inputs)
        call = Rerank(
            query=query,
            documents=documents,
            truncate=request.truncation is not False,
            instruction=request.instruction,
            max_query_tokens=request.max_query_length,
            max_document_tokens=request.max_doc_length,
            embeddings=bool(request.return_embeddings),
        )
        if spec.kind == "reranker":
            ranking = await state.engine.run(spec.id, call)
        else:
            ranking = await rank_by_vectors(state.engine, spec, call, _output(spec, request))
    # The model's own, also among scores that are equal as they are written.
    order = np.argsort(-ranking.scores, kind="stable")[: request.top_n]
    scores = np.round(ranking.scores.astype(np.float64), 8) + 0.0  # the sum makes 0 of -0
    repeated: list[Any] | None = None
    if request.return_documents is not False:
        repeated = [_repeated(spec, document) for document in request.documents]
    return RerankAnswer(
        model=spec.id if request.model is None else state.answering(request.model),
        ranking=ranking,
        order=order.tolist(),
        scores=scores.tolist(),
        documents=repeated,
    )


async def write(answer: RerankAnswer) -> bytes:
    """The answer in the order of keys that the hosted API uses (measured): model, object, usage, results."""
    embeddings, documents = answer.ranking.embeddings, answer.documents

    def result(_: int, place: int) -> dict[str, Any]:
        found: dict[str, Any] = {"index": place, "relevance_score": answer.scores[place]}
        if documents is not None:
            found["document"] = documents[place]
        if embeddings is not None:
            found["embedding"] = embeddings[place]
        return found

    usage = {"total_tokens": answer.ranking.n_tokens}
    return await long_answer(
        {"model": answer.model, "object": "list", "usage": usage},
        "results",
        answer.order,
        result,
        # Writing a document takes about as long as some hundred numbers do.
        numbers_per_row=512 if embeddings is None else 512 + embeddings.shape[1],
    )


@router.post(
    "/v1/rerank",
    summary="Rerank",
    tags=["Search Foundation Models"],
    openapi_extra=request_body(RerankRequest),
    responses=responses(RerankingResponse),
)
async def rerank_documents(request: Request) -> Response:
    """Put documents in the order of their relevance to a query."""
    return await _answer(request, await read_body(request, RerankRequest))


@router.post(
    "/v2/rerank",
    summary="Rerank, for clients of Cohere's second API",
    tags=["Search Foundation Models"],
    openapi_extra=request_body(RerankRequest),
    responses=responses(RerankingResponse),
)
async def rerank_places(request: Request) -> Response:
    """The same, and no result repeats its document."""
    asked = await read_body(request, RerankRequest)
    return await _answer(request, asked.model_copy(update={"return_documents": False}))


async def _answer(request: Request, asked: RerankRequest) -> Response:
    answer = await while_awaited(request, rerank(state_of(request), asked))
    ranking = answer.ranking
    request.state.log = {"model": answer.model, "inputs": len(asked.documents), "tokens": ranking.n_tokens}
    return written(await write(answer), ranking.n_truncated)


def _default(state: State) -> ModelSpec:
    """The model that a request means which names none.

    Raises:
        InputError: several could be meant, or none.
    """
    able = {model: spec for model, spec in state.served().items() if spec.score is not None}
    if DEFAULT in able:
        return able[DEFAULT]
    candidates = [spec for spec in able.values() if spec.kind == "reranker"] or list(able.values())
    if len(candidates) == 1:
        return candidates[0]
    message = f"Field required: several models are served that can rank: {', '.join(sorted(able))}."
    if not able:
        message = "No model is served that can rank."
    raise InputError(Fault("body -> model", message, "missing"))


def _repeated(spec: ModelSpec, document: Document) -> Any:
    """A document as an answer of this model repeats it."""
    return {"text": document.content} if spec.wraps_documents and isinstance(document.content, str) else document.sent


def _readable(state: State, spec: ModelSpec, document: Document, field: str) -> Part:
    """What the model reads of a query or a document; a data URI is the image that it holds, where it reads images.

    Raises:
        InputError: media that it does not read, or beside a text; a PDF is several images and no document.
    """
    content, sent = document.content, document.sent
    if isinstance(content, str) and isinstance(sent, dict):
        for kind in spec.modalities:
            if kind != "text" and sent.get(kind) is not None:
                raise InputError(Fault(field, f"It has a text and {kind} input, of which one is read: leave one out."))
    bare = content if isinstance(content, Reference) else read_bare_input(spec, content, field)
    if isinstance(bare, str):
        return bare
    assert isinstance(bare, Reference)
    kinds = [kind for kind in spec.modalities if kind != "pdf"]
    if bare.kind in kinds:
        return bare
    able = state.able(lambda other: other.score and bare.kind in other.modalities)
    message = (
        f"Model '{spec.id}' ranks {' and '.join(kinds)}{' only' if len(kinds) == 1 else ''}. "
        f"Models served here that rank {bare.kind} input: {able}."
    )
    if bare.kind == "pdf":
        message = "A PDF is several images, and a document is one. Send its pages as images."
    raise InputError(Fault(field, message, "modality"))


def _output(spec: ModelSpec, request: RerankRequest) -> Output:
    """What an embedding model makes of the texts that are compared: what it does first, unless asked otherwise."""
    if request.return_multivector:
        return "multi"
    return "sparse" if request.return_sparse else spec.outputs[0]


def _check(state: State, spec: ModelSpec, request: RerankRequest) -> None:
    """Refuse what the catalogue says that this model cannot do.

    Raises:
        InputError: naming the field and the way out.
    """
    if spec.score is None:
        raise InputError(Fault("body -> model", f"Model '{spec.id}' is a {spec.kind} model, which cannot rank."))
    faults = []
    for field in ("instruction", "return_embeddings", "max_doc_length", "max_query_length"):
        if field not in spec.takes and _asks(spec, getattr(request, field)):
            able = state.able(partial(_takes, field=field))
            message = f"Model '{spec.id}' does not take it. Models served here that do: {able}."
            faults.append(Fault(f"body -> {field}", message))
    if request.rank_fields not in (None, [], ["text"]):
        faults.append(Fault("body -> rank_fields", "Documents are ranked by their 'text' alone; leave it out."))
    able_to = spec.outputs if spec.kind == "embedding" else ()
    for field, output in (("return_multivector", "multi"), ("return_sparse", "sparse")):
        if getattr(request, field) and output not in able_to:
            faults.append(Fault(f"body -> {field}", f"Model '{spec.id}' does not score so; leave it out."))
    if request.return_multivector and request.return_sparse:
        faults.append(Fault("body -> return_sparse", "It does not go with return_multivector: ask for one of them."))
    if faults:
        raise InputError(*faults)


def _takes(spec: ModelSpec, field: str) -> bool:
    return field in spec.takes


def _asks(spec: ModelSpec, value: str | int | None) -> bool:
    """Whether a value asks a model without the field for anything: a length that it cannot exceed does not."""
    return value < spec.context if isinstance(value, int) and not isinstance(value, bool) else bool(value)
