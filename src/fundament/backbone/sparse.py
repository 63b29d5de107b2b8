"""Sparse vectors: what weighs more than nothing, as ids and weights in one array, then as tokens and weights."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fundament.backbone.tokenizing import TextTokenizer
from fundament.catalog import ModelSpec
from fundament.core import Array, SparseVectors


def sparse(ids: Array, weights: Array) -> NDArray[np.float32]:
    """Ids over their weights, float32 `[2, n]`, the heaviest first and equals by id; weights of zero are left out.

    Float32 holds every whole number below 2 ** 24, so that ids are exact. A weight that is not a number stays, for the
    batcher to see.
    """
    above = ~(weights <= 0)
    ids, weights = ids[above], weights[above]
    order = np.lexsort((ids, -weights))
    return np.stack((ids[order], weights[order])).astype(np.float32)


def sparse_rows(weights: Tensor) -> list[NDArray[np.float32]]:
    """`sparse` of each row of weights of the whole vocabulary, `[rows, vocab]`, none of them below zero.

    How many are above zero the device alone knows: the host waits for that, once for all rows.
    """
    places = weights.nonzero()
    rows, ids = places.T.cpu().numpy()
    found = weights[places[:, 0], places[:, 1]].cpu().numpy()
    ends = np.searchsorted(rows, np.arange(1, len(weights)))
    return [sparse(*row) for row in zip(np.split(ids, ends), np.split(found, ends), strict=True)]


def heaviest(ids: Array, weights: Array) -> NDArray[np.float32]:
    """As `sparse`, of tokens that may repeat: each id has the weight of its heaviest token."""
    distinct, places = np.unique(ids, return_inverse=True)
    most = np.zeros(len(distinct), dtype=np.float32)
    with np.errstate(invalid="ignore"):
        np.maximum.at(most, places, weights)
    return sparse(distinct, most)


def named(array: Array, name: Callable[[int], str]) -> dict[str, float]:
    """Token → weight, in the array's order."""
    ids, weights = array
    return {name(int(number)): weight for number, weight in zip(ids.tolist(), weights.tolist(), strict=True)}


def sparse_vectors(arrays: Sequence[Array], spec: ModelSpec, tokenizer: TextTokenizer) -> SparseVectors:
    """The weights of a call's rows by their tokens, as `spec` has these written."""

    def name(number: int) -> str:
        token = tokenizer.token_of(number)
        return token.replace(".", "__") if spec.dotless else token

    return SparseVectors(weights=[named(array, name) for array in arrays])
