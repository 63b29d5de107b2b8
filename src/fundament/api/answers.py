"""Writing what the embeddings verb answers: a vector per input, a vector per token, or a weight per token."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fundament.api.wire import long_answer
from fundament.core import Embedded, Embeddings, MultiVectors, SparseVectors
from fundament.vectors import Encoding, Floats, encode, encode_each, shorten, shorten_each

COUNTS_OUTPUT = "elser-v2"  # its usage has other keys than every other model's


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


def cut(result: Embedded, dimensions: int | None, *, normalized: bool) -> Embedded:
    """The vectors cut and scaled; weights stay as they are."""
    match result:
        case Embeddings():
            return replace(result, vectors=shorten(result.vectors, dimensions, normalized=normalized))
        case MultiVectors():
            return replace(result, vectors=shorten_each(result.vectors, dimensions, normalized=normalized))
        case SparseVectors():
            return result


async def write(answer: EmbeddingsAnswer) -> bytes:
    """The answer in the order of keys that the hosted API uses (measured): model, object, usage, data."""
    head = {"model": answer.model, "object": "list", "usage": _usage(answer)}
    match answer.made:
        case Embeddings(vectors=vectors):
            return await long_answer(
                head,
                "data",
                vectors,  # type: ignore[arg-type]
                lambda index, vector: _item(index, "embedding", _written(vector, answer.encodings)),
                numbers_per_row=vectors.shape[1],
            )
        case MultiVectors(vectors=rows, tokens=tokens):

            def item(index: int, row: Floats) -> dict[str, Any]:
                found = _item(index, "embeddings", _written(row, answer.encodings))
                return found if tokens is None else found | {"tokenized_input": tokens[index]}

            return await long_answer(head, "data", rows, item, numbers_per_row=max(row.size for row in rows))
        case SparseVectors(weights=weights):
            return await long_answer(
                head,
                "data",
                weights,
                lambda index, weight: _item(index, "embedding", weight),
                numbers_per_row=max(map(len, weights)),
            )


def _item(index: int, kind: str, value: object) -> dict[str, Any]:
    """An element of `data`: `object` says under which key its value is."""
    return {"object": kind, "index": index, kind: value}


def _written(vectors: Floats, encodings: list[Encoding]) -> object:
    one = encode if vectors.ndim == 1 else encode_each
    return one(vectors, encodings[0]) if len(encodings) == 1 else {each: one(vectors, each) for each in encodings}


def _usage(answer: EmbeddingsAnswer) -> Mapping[str, int]:
    n_tokens = answer.made.n_tokens
    if not answer.counts_output:
        made = answer.made
        n_media = {} if isinstance(made, SparseVectors) else made.n_media
        return {
            "total_tokens": n_tokens,
            "prompt_tokens": n_tokens,
            **{f"{kind}_tokens": n_media[kind] for kind in ("image", "audio", "video") if n_media.get(kind)},
        }
    return {"total_tokens": n_tokens, "input_tokens": n_tokens, "output_tokens": 0}
