"""Writing what the embeddings verb answers: a vector per input, a vector per token, or a weight per token."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import BaseModel

from fundament.api.schemas import OrAbsent
from fundament.api.wire import long_answer
from fundament.core import Embedded, Embeddings, MultiVectors, SparseVectors, sum_media
from fundament.vectors import Encoding, Floats, encode, encode_each, shorten, shorten_each

_MANY_NUMBERS = 1_000_000  # more hold up the event loop for milliseconds


class EmbeddingUsage(BaseModel):
    """Tokens read; the first two numbers are equal. The others say how many of them stand for media."""

    total_tokens: int
    prompt_tokens: int
    image_tokens: OrAbsent[int] = None
    audio_tokens: OrAbsent[int] = None
    video_tokens: OrAbsent[int] = None


class ELSERV2EmbeddingUsage(BaseModel):
    """Tokens read by elser-v2; it writes none."""

    total_tokens: int
    input_tokens: int
    output_tokens: int


class SingleEmbeddingData(BaseModel):
    """One input's vector, or its weight of each token, the heaviest first."""

    object: str
    index: int
    embedding: list[float] | str | dict[str, list[float] | str] | dict[str, float]


TokenVectors = list[list[float]] | list[str]


class MultiEmbeddingData(BaseModel):
    """One input's vectors, one per token."""

    object: str
    index: int
    embeddings: TokenVectors | dict[str, TokenVectors]
    tokenized_input: OrAbsent[list[str]] = None


class EmbeddingResponse(BaseModel):
    """One item per input, in order."""

    model: str
    object: str
    usage: EmbeddingUsage | ELSERV2EmbeddingUsage
    data: list[SingleEmbeddingData] | list[MultiEmbeddingData]


@dataclass(frozen=True, slots=True)
class EmbeddingsAnswer:
    """What the verb answers, before it is written.

    Attributes:
        model: as the caller named it.
        made: what the inputs became, cut and scaled as asked.
        encodings: how each vector is written; several make an object keyed by encoding.
        counts_output: whether `usage` tells input and output tokens apart.
    """

    model: str
    made: Embedded
    encodings: list[Encoding]
    counts_output: bool = False


async def cut(result: Embedded, dimensions: int | None, *, normalized: bool) -> Embedded:
    """The vectors cut and scaled, many of them on another thread; weights stay as they are."""
    match result:
        case Embeddings():
            n_numbers = result.vectors.size
        case MultiVectors():
            n_numbers = sum(each.size for each in result.vectors)
        case SparseVectors():
            return result
    work = partial(_cut, result, dimensions, normalized=normalized)
    return await asyncio.to_thread(work) if n_numbers > _MANY_NUMBERS else work()


def _cut(result: Embeddings | MultiVectors, dimensions: int | None, *, normalized: bool) -> Embedded:
    if isinstance(result, Embeddings):
        return replace(result, vectors=shorten(result.vectors, dimensions, normalized=normalized))
    return replace(result, vectors=shorten_each(result.vectors, dimensions, normalized=normalized))


async def write(answer: EmbeddingsAnswer) -> bytes:
    """The answer in the order of keys that the hosted API uses (measured): model, object, usage, data."""
    rows, item, numbers_per_row = _rows(answer)
    return await long_answer(_head(answer), "data", rows, item, numbers_per_row=numbers_per_row)


def contents(answer: EmbeddingsAnswer) -> dict[str, Any]:
    """The same as a value to be written, for an answer that is small."""
    rows, item, _ = _rows(answer)
    return {**_head(answer), "data": [item(index, row) for index, row in enumerate(rows)]}


def divided(answer: EmbeddingsAnswer, sizes: Sequence[int]) -> list[EmbeddingsAnswer]:
    """An answer as answers to that many inputs each; it must know the tokens of each input."""
    answers, start = [], 0
    for size in sizes:
        part = slice(start, start := start + size)
        answers.append(replace(answer, made=_part(answer.made, part)))
    return answers


def _part(made: Embedded, part: slice) -> Embedded:
    n_tokens, n_media = sum(made.n_tokens_each[part]), sum_media(made.n_media_each[part])
    match made:
        case Embeddings():
            return Embeddings(vectors=made.vectors[part], n_tokens=n_tokens, n_media=n_media)
        case MultiVectors():
            tokens = None if made.tokens is None else made.tokens[part]
            return MultiVectors(vectors=made.vectors[part], tokens=tokens, n_tokens=n_tokens, n_media=n_media)
        case SparseVectors():
            return SparseVectors(weights=made.weights[part], n_tokens=n_tokens, n_media=n_media)


def _head(answer: EmbeddingsAnswer) -> dict[str, Any]:
    return {"model": answer.model, "object": "list", "usage": _usage(answer)}


def _rows(answer: EmbeddingsAnswer) -> tuple[Sequence[Any], Callable[[int, Any], dict[str, Any]], int]:
    """What `data` is made from, what makes an element of it, and about how many numbers that holds."""
    match answer.made:
        case Embeddings(vectors=vectors):

            def vector(index: int, row: Floats) -> dict[str, Any]:
                return _item(index, "embedding", _written(row, answer.encodings))

            return vectors, vector, vectors.shape[1]  # type: ignore[return-value]
        case MultiVectors(vectors=rows, tokens=tokens):

            def item(index: int, row: Floats) -> dict[str, Any]:
                found = _item(index, "embeddings", _written(row, answer.encodings))
                return found if tokens is None else found | {"tokenized_input": tokens[index]}

            return rows, item, max(row.size for row in rows)
        case SparseVectors(weights=weights):
            return weights, lambda index, weight: _item(index, "embedding", weight), max(map(len, weights))


def _item(index: int, kind: str, value: object) -> dict[str, Any]:
    """An element of `data`: `object` says under which key its value is."""
    return {"object": kind, "index": index, kind: value}


def _written(vectors: Floats, encodings: list[Encoding]) -> object:
    one = encode if vectors.ndim == 1 else encode_each
    return one(vectors, encodings[0]) if len(encodings) == 1 else {each: one(vectors, each) for each in encodings}


def _usage(answer: EmbeddingsAnswer) -> Mapping[str, int]:
    n_tokens, n_media = answer.made.n_tokens, answer.made.n_media
    if answer.counts_output:
        return {"total_tokens": n_tokens, "input_tokens": n_tokens, "output_tokens": 0}
    return {
        "total_tokens": n_tokens,
        "prompt_tokens": n_tokens,
        **{f"{kind}_tokens": n_media[kind] for kind in ("image", "audio", "video") if n_media.get(kind)},
    }
