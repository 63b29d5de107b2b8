"""What a caller may ask of vectors once they are computed: cut, normalise, quantise, compare. Plain NumPy."""

import base64
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Encoding = Literal["float", "base64", "binary", "ubinary"]


def shorten(vectors: Floats, dimensions: int | None, *, normalized: bool) -> Floats:
    """Keep the first `dimensions` numbers of each vector (Matryoshka), then scale to unit length if `normalized`.

    Args:
        vectors: `[rows, dim]`.
        dimensions: how many to keep; None keeps all.
        normalized: divide by the Euclidean length; a vector of zeros stays as it is.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if normalized:
        # Squares are summed in float64: in float32 they leave its range long before the numbers do.
        lengths = np.sqrt(np.einsum("rd,rd->r", vectors, vectors, dtype=np.float64))[:, None]
        return np.divide(vectors, np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def encode(vector: Floats, encoding: Encoding) -> NDArray[np.generic] | str:
    """One vector as the API writes it (bit order and offset measured on the hosted API).

    Args:
        vector: `[dim]`.
        encoding: `float`, the numbers; `base64`, little-endian float32 bytes; `ubinary`, one bit per number (set where
            it is above zero), most significant first, as bytes 0 to 255; `binary`, the same bytes minus 128.
    """
    match encoding:
        case "float":
            return vector
        case "base64":
            return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
        case "ubinary":
            return np.packbits(vector > 0, axis=-1)
        case "binary":
            return (np.packbits(vector > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)


def encode_each(vectors: Floats, encoding: Encoding) -> NDArray[np.generic] | list[NDArray[np.generic] | str]:
    """Each vector of `[vectors, dim]` as `encode` writes one: a matrix, or a list of strings for `base64`."""
    if encoding == "base64":
        return [encode(vector, encoding) for vector in vectors]
    matrix = encode(vectors, encoding)
    assert not isinstance(matrix, str)
    return matrix


def shorten_each(rows: Sequence[Floats], dimensions: int | None, *, normalized: bool) -> list[Floats]:
    """As `shorten`, of rows that have several vectors each, `[vectors, dim]`."""
    bounds = np.cumsum([len(row) for row in rows])[:-1]
    return np.split(shorten(np.concatenate(rows), dimensions, normalized=normalized), bounds)


def cosine(query: Floats, documents: Floats) -> Floats:
    """The cosine of one vector with each of others; 0 where one is all zeros.

    Args:
        query: `[dim]`.
        documents: `[documents, dim]`.

    Returns:
        `[documents]`, -1 to 1.
    """
    scores: Floats = shorten(documents, None, normalized=True) @ shorten(query[None], None, normalized=True)[0]
    return np.clip(scores, -1, 1)  # unit lengths are rounded


def product(query: Floats, documents: Floats) -> Floats:
    """The inner product of one vector with each of others, of any lengths: `[dim]` and `[documents, dim]`."""
    scores: Floats = documents @ query
    return scores


def maxsim(query: Floats, documents: Sequence[Floats]) -> Floats:
    """Late interaction (Khattab and Zaharia, 2020, equation 3): for each query vector the best cosine, summed.

    Args:
        query: `[query tokens, dim]`.
        documents: each `[tokens, dim]`, with at least one token.

    Returns:
        `[documents]`, at most the number of query tokens.
    """
    scaled = shorten(query, None, normalized=True)
    cosines = (np.clip(scaled @ shorten(one, None, normalized=True).T, -1, 1) for one in documents)
    best = (np.max(each, axis=1).sum() for each in cosines)
    return np.fromiter(best, dtype=np.float32, count=len(documents))


def dot(query: Mapping[str, float], documents: Sequence[Mapping[str, float]]) -> Floats:
    """The product of one text's weights with each of others', token by token, `[documents]`."""
    products = (sum(weight * one.get(token, 0.0) for token, weight in query.items()) for one in documents)
    return np.fromiter(products, dtype=np.float32, count=len(documents))
