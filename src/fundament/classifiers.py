"""Classes of vectors: by likeness to the names of the classes, or learned from examples. Plain NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from fundament.core import Array

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.integer]

_C = 100.0  # the inverse weight of the penalty: best calibrated on few examples
_FLAT = 1e-13  # of the examples' summed squares: below it, a direction is rounding
_AT_REST = 1e-6  # largest slope of the loss, summed over the examples, at which it counts as least
_INNER_STEPS = 200


@dataclass(frozen=True, slots=True)
class Head:
    """What training learns: a linear layer over unit vectors.

    Attributes:
        weights: float32 `[classes, dim]`.
        bias: float32 `[classes]`.
    """

    weights: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Examples:
    """What training learns from.

    Attributes:
        vectors: float16 `[examples, dim]` of unit length: half the room, and what is lost decides nothing.
        classes: int16 `[examples]`, the number of each example's class.
    """

    vectors: NDArray[np.float16]
    classes: NDArray[np.int16]


def likeness(vectors: Floats, classes: Floats) -> Floats:
    """How likely each class is by the cosine of its name's vector: softmax at temperature 1, as the hosted API.

    Args:
        vectors: `[rows, dim]` of unit length.
        classes: `[classes, dim]` of unit length.

    Returns:
        `[rows, classes]`; each row sums to 1.
    """
    _use_one_thread()
    logits = vectors @ classes.T
    return _softmax(logits.astype(np.float64)).astype(np.float32)


def apply(head: Head, vectors: Floats) -> Floats:
    """How likely each class is to a trained head, `[rows, classes]`, for unit vectors `[rows, dim]`."""
    _use_one_thread()
    logits = vectors @ head.weights.T + head.bias
    return _softmax(logits.astype(np.float64)).astype(np.float32)


def fit(examples: Examples, n_classes: int, *, n_steps: int = 10) -> Head:
    """Multinomial logistic regression with an L2 penalty on the weights, not on the bias.

    The loss is convex, so that nothing depends on the order of the examples or on how they came: it is minimised by
    Newton's method, each step solved by conjugate gradients. In the basis of the examples' principal directions the
    problem has no more unknowns than examples, and is scaled so that few inner steps do.

    Args:
        examples: at least one of each class.
        n_classes: two or more.
        n_steps: Newton steps at most; on real data fewer than ten reach the minimum.
    """
    _use_one_thread()
    return _fit(examples.vectors.astype(np.float64), examples.classes, n_classes, n_steps)


def write_head(head: Head) -> bytes:
    """A head as a safetensors file."""
    return _write(weights=head.weights, bias=head.bias)


def read_head(content: bytes) -> Head:
    """The head in such a file."""
    return Head(**load(content))


def write_examples(examples: Examples) -> bytes:
    """Examples as a safetensors file."""
    return _write(vectors=examples.vectors, classes=examples.classes)


def read_examples(contents: Sequence[bytes]) -> Examples:
    """The examples in such files, one after the other."""
    parts = [load(content) for content in contents]
    return Examples(*(np.concatenate([part[name] for part in parts]) for name in ("vectors", "classes")))


def _write(**arrays: Array) -> bytes:
    # safetensors writes an array as it lies in memory, and says nothing where that is not row by row.
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _fit(vectors: Doubles, classes: Integers, n_classes: int, n_steps: int) -> Head:
    mean = vectors.mean(axis=0)
    rows, basis, squares = _principal(vectors - mean)
    n, rank = rows.shape
    rows = np.append(rows, np.ones((n, 1)), axis=1)  # the last column carries the bias
    penalty = np.append(np.full(rank, 1 / _C), 0)[:, None]
    curvature = (1 - 1 / n_classes) / n_classes  # of the loss at the start, where all classes are alike
    scale = 1 / (curvature * np.append(squares, n)[:, None] + penalty)
    wanted = np.eye(n_classes)[classes]

    def loss(layer: Doubles) -> float:
        logits = rows @ layer
        top = logits.max(axis=1)
        sums = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(n), classes]
        return float(sums.sum() + (penalty * layer**2).sum() / 2)

    layer = np.zeros((rank + 1, n_classes))
    least = loss(layer)
    for _ in range(n_steps):
        likely = _softmax(rows @ layer)
        slope = rows.T @ (likely - wanted) + penalty * layer
        if np.abs(slope).max() < _AT_REST:
            break
        step = _newton_step(rows, likely, slope, penalty, scale)
        size, gain = 1.0, float((slope * step).sum())
        while (reached := loss(layer + size * step)) > least + 1e-4 * size * gain and size > 1e-6:
            size /= 2
        if reached >= least:
            break
        layer, least = layer + size * step, reached
    weights = basis @ layer[:-1]
    return Head(weights.T.astype(np.float32), (layer[-1] - mean @ weights).astype(np.float32))


@cache
def _use_one_thread() -> None:
    """Have the calling thread alone make products: they are small, and others would wait for cores where models work.

    From now on in the whole process: a BLAS library has one number of threads for all who call it.
    """
    ThreadpoolController().limit(limits=1, user_api="blas")


def _principal(vectors: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Centred vectors in the basis of their principal directions, that basis, and the summed squares along each.

    The products are made of whichever of `vectors @ vectors.T` and `vectors.T @ vectors` is smaller.

    Returns:
        `[rows, rank]`, `[dim, rank]`, `[rank]`.
    """
    n, dim = vectors.shape
    squares, axes = np.linalg.eigh(vectors @ vectors.T if n < dim else vectors.T @ vectors)
    kept = squares > n * _FLAT
    squares, axes = squares[kept], axes[:, kept]
    if n < dim:
        return axes * np.sqrt(squares), vectors.T @ axes / np.sqrt(squares), squares
    return vectors @ axes, axes, squares


def _newton_step(rows: Doubles, likely: Doubles, slope: Doubles, penalty: Doubles, scale: Doubles) -> Doubles:
    """Where the loss's second-order model is least, by conjugate gradients preconditioned with `scale`."""
    step = np.zeros_like(slope)
    rest = -slope
    scaled = scale * rest
    direction, size = scaled, float((rest * scaled).sum())
    enough = size * min(1e-2, float(np.abs(slope).max()) / len(rows))
    for _ in range(_INNER_STEPS):
        along = likely * (rows @ direction)
        curved = rows.T @ (along - likely * along.sum(axis=1, keepdims=True)) + penalty * direction
        length = size / float((direction * curved).sum())
        step = step + length * direction
        rest = rest - length * curved
        scaled = scale * rest
        before, size = size, float((rest * scaled).sum())
        if size <= enough:
            break
        direction = scaled + size / before * direction
    return step


def _softmax(logits: Doubles) -> Doubles:
    likely: Doubles = np.exp(logits - logits.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    return likely
