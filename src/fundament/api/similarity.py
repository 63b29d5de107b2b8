"""Ranking with an embedding model: query and documents become vectors, which are compared and let go."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fundament.api.state import Engine
from fundament.catalog import ModelSpec, Score
from fundament.core import (
    Embed,
    Embedded,
    Embeddings,
    Media,
    MultiVectors,
    Output,
    Ranking,
    Rerank,
    Role,
    SparseVectors,
)
from fundament.errors import Fault, InputError, TooLongError
from fundament.vectors import Floats, cosine, dot, maxsim, product

# What is embedded at a time, so that the vectors of thousands of long documents are never held together.
_SLICE_DOCUMENTS, _SLICE_CHARACTERS = 256, 256 * 1024


async def rank_by_vectors(engine: Engine, spec: ModelSpec, call: Rerank, output: Output) -> Ranking:
    """Score documents by how near their vectors are to the query's. Equal documents are read once.

    Args:
        engine: what embeds.
        spec: the embedding model; its tasks for queries and passages are used where it has them, and its own score.
        call: what is asked.
        output: what is compared: one vector each (cosine, or product), one per token (MaxSim), or weights (product).

    Raises:
        FundamentError: what the model cannot read, named as the query or by the document's place.
    """
    different = list(dict.fromkeys(call.documents))
    query_task, document_task = (task or spec.default_task for task in spec.search_tasks)

    async def embed(inputs: Sequence[str | Media], task: str | None, role: Role) -> Embedded:
        def origin(place: int) -> str:
            return "query" if role == "query" else f"documents -> {call.documents.index(inputs[place])}"

        def field_of(fault: Fault) -> str:
            return re.sub(r"input -> (\d+)", lambda found: origin(int(found[1])), fault.field, count=1)

        asked = Embed(inputs=inputs, task=task, truncate=call.truncate, output=output, role=role)
        try:
            return await engine.run(spec.id, asked)
        except TooLongError as error:
            name = "The query" if role == "query" else f"Document {call.documents.index(inputs[error.index])}"
            raise TooLongError(name, n_tokens=error.n_tokens, limit=error.limit, more=error.more) from None
        except InputError as error:
            raise InputError(*(replace(fault, field=field_of(fault)) for fault in error.faults)) from None

    query = await embed([call.query], query_task, "query")
    scores, n_tokens, n_truncated = np.empty(len(different), dtype=np.float32), query.n_tokens, 0
    for part in slices(different):
        found = await embed(different[part], document_task, "document")
        scores[part] = await asyncio.to_thread(compare, query, found, spec.score)
        n_tokens, n_truncated = n_tokens + found.n_tokens, n_truncated + found.n_truncated
    place_of = {value: place for place, value in enumerate(different)}
    places = [place_of[value] for value in call.documents]
    return Ranking(scores=scores[places], n_tokens=n_tokens, n_truncated=n_truncated)


def slices(documents: Sequence[str | Media]) -> Iterator[slice]:
    """Divide documents, in their order, into slices of bounded number and text; a longer text is one alone."""
    start = n_characters = 0
    for place, document in enumerate(documents):
        length = len(document) if isinstance(document, str) else 0
        full = place - start == _SLICE_DOCUMENTS or n_characters + length > _SLICE_CHARACTERS
        if full and place > start:
            yield slice(start, place)
            start, n_characters = place, 0
        n_characters += length
    yield slice(start, len(documents))


def compare(query: Embedded, documents: Embedded, score: Score | None) -> Floats:
    """The score of each document with the one query, `[documents]`; both are of the same kind.

    Args:
        query: of one input.
        documents: of any number.
        score: the model's own: `dot` compares single vectors with their lengths.
    """
    match query, documents:
        case Embeddings(), Embeddings() if score == "dot":
            return product(query.vectors[0], documents.vectors)
        case Embeddings(), Embeddings():
            return cosine(query.vectors[0], documents.vectors)
        case MultiVectors(), MultiVectors():
            return maxsim(query.vectors[0], documents.vectors)
        case SparseVectors(), SparseVectors():
            return dot(query.weights[0], documents.weights)
    raise TypeError(f"{type(query).__name__} and {type(documents).__name__} cannot be compared")
