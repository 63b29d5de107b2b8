"""Classes of vectors: the fit is scikit-learn's, and examples that come in parts teach what they teach at once."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch import from_numpy
from torch.testing import assert_close

from fundament import classifiers
from fundament.classifiers import (
    Examples,
    Floats,
    apply,
    fit,
    likeness,
    read_examples,
    read_head,
    write_examples,
    write_head,
)
from fundament.core import Embed, Model
from fundament.vectors import shorten

INTENTS = Path(__file__).with_name("intents.csv")
N_TRAIN = 24  # of each label; the other texts are asked


def made_up(n: int, dim: int, n_classes: int, *, noise: float = 2.0) -> Examples:
    """Unit vectors around the middle of their class."""
    random = np.random.default_rng(n * dim)
    classes = np.arange(n) % n_classes
    vectors = random.normal(size=(n_classes, dim))[classes] + noise * random.normal(size=(n, dim)) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Examples(vectors.astype(np.float16), classes.astype(np.int16))


def reference(examples: Examples, n_classes: int) -> LogisticRegression:
    """scikit-learn's fit, to the end. Of two classes it has one row of weights, the difference of ours."""
    c = 100 if n_classes > 2 else 200
    model = LogisticRegression(C=c, tol=1e-8, max_iter=10_000)
    with threadpool_limits(1):
        return model.fit(examples.vectors.astype(np.float64), examples.classes)


def close(found: Floats, expected: NDArray[np.floating], tolerance: float = 1e-5) -> None:
    assert_close(from_numpy(found), from_numpy(expected.astype(np.float32)), atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("n", "dim", "n_classes"), [(60, 16, 5), (60, 200, 5), (2, 8, 2), (40, 8, 2), (96, 64, 16), (3, 300, 3)]
)
def test_the_fit_is_that_of_scikit_learn(n: int, dim: int, n_classes: int) -> None:
    examples = made_up(n, dim, n_classes)
    asked = made_up(50, dim, n_classes).vectors.astype(np.float32)
    found = apply(fit(examples, n_classes), asked)
    close(found, reference(examples, n_classes).predict_proba(asked.astype(np.float64)))


def test_ten_steps_reach_the_end() -> None:
    examples = made_up(384, 384, 16)
    asked = examples.vectors.astype(np.float32)
    close(apply(fit(examples, 16), asked), apply(fit(examples, 16, n_steps=1_000), asked), 1e-6)


def test_fewer_steps_learn_less() -> None:
    examples = made_up(200, 32, 4)
    asked, right = examples.vectors.astype(np.float32), examples.classes
    heads = [fit(examples, 4, n_steps=steps) for steps in (1, 3, 10)]
    certain = [np.log(apply(head, asked)[np.arange(len(right)), right]).mean() for head in heads]
    assert certain == sorted(certain)
    assert certain[0] < certain[-1] - 0.01


def test_the_order_of_examples_does_not_matter() -> None:
    examples = made_up(120, 48, 6)
    order = np.random.default_rng(0).permutation(120)
    shuffled = Examples(examples.vectors[order], examples.classes[order])
    asked = examples.vectors.astype(np.float32)
    close(apply(fit(examples, 6), asked), apply(fit(shuffled, 6), asked))


@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((6, 8)),  # one text under several labels
        np.zeros((6, 8)),
        np.eye(6, 8),
        np.repeat(np.eye(2, 8), 3, axis=0),
    ],
    ids=["one point", "zero", "orthogonal", "two points"],
)
def test_degenerate_examples_have_a_finite_head(vectors: NDArray[np.float64]) -> None:
    examples = Examples(vectors.astype(np.float16), np.array([0, 0, 1, 1, 2, 2], np.int16))
    found = apply(fit(examples, 3), vectors.astype(np.float32))
    assert np.isfinite(found).all()
    assert_close(found.sum(axis=1), np.ones(6, np.float32))
    if not vectors.any() or (vectors == 1).all():
        close(found, np.full((6, 3), 1 / 3))


def test_what_cannot_be_told_apart_is_as_likely_as_it_was_frequent() -> None:
    examples = Examples(np.ones((8, 4), np.float16) / 2, np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int16))
    close(apply(fit(examples, 2), np.ones((1, 4), np.float32) / 2), np.array([[0.75, 0.25]]))


def test_likeness_is_the_softmax_of_cosines() -> None:
    """The hosted API's scores in one captured answer are of this form: exp(cosine) over their sum."""
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float32)
    labels = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    cosines = np.array([[1, 0, -1], [0.6, 0.8, -0.6]])
    expected = np.exp(cosines) / np.exp(cosines).sum(axis=1, keepdims=True)
    close(likeness(vectors, labels), expected, 1e-6)


def test_a_row_alone_is_a_row_in_company() -> None:
    examples = made_up(64, 24, 4)
    head, asked = fit(examples, 4), examples.vectors.astype(np.float32)
    close(np.concatenate([apply(head, asked[[row]]) for row in range(64)]), apply(head, asked), 1e-6)


def test_heads_and_examples_are_written_and_read_without_a_loss() -> None:
    parts = [made_up(30, 12, 3), made_up(10, 12, 3)]
    read = read_examples([write_examples(part) for part in parts])
    np.testing.assert_array_equal(read.vectors, np.concatenate([part.vectors for part in parts]))
    np.testing.assert_array_equal(read.classes, np.concatenate([part.classes for part in parts]))
    head = fit(read, 3)
    again = read_head(write_head(head))
    np.testing.assert_array_equal(again.weights, head.weights)
    np.testing.assert_array_equal(again.bias, head.bias)
    assert read.vectors.dtype == np.float16
    assert head.weights.dtype == np.float32


@pytest.fixture(scope="module")
def intents(minilm_float32: Model) -> Iterator[tuple[Examples, Floats, NDArray[np.int16]]]:
    """16 intents of a bank's customers: examples to learn from; vectors to ask, and their right classes."""
    with INTENTS.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    call = Embed(inputs=[row["text"] for row in rows])
    items = minilm_float32.prepare(call)
    made = minilm_float32.finish(call, items, minilm_float32.forward(items))
    vectors = shorten(made.vectors, None, normalized=True)
    classes = np.array([labels.index(row["label"]) for row in rows], np.int16)
    known = np.concatenate([np.flatnonzero(classes == number)[:N_TRAIN] for number in range(len(labels))])
    known = np.random.default_rng(4).permutation(known)
    asked = np.setdiff1d(np.arange(len(rows)), known)
    yield Examples(vectors[known].astype(np.float16), classes[known]), vectors[asked], classes[asked]


def test_real_intents_are_told_apart_as_well_as_by_scikit_learn(
    intents: tuple[Examples, Floats, NDArray[np.int16]],
) -> None:
    examples, asked, right = intents
    assert examples.classes.shape == (16 * N_TRAIN,)
    found = (apply(fit(examples, 16), asked).argmax(axis=1) == right).mean()
    expected = (reference(examples, 16).predict(asked.astype(np.float64)) == right).mean()
    assert found >= expected - 0.01
    assert found > 0.7


def test_four_parts_teach_what_they_teach_at_once(intents: tuple[Examples, Floats, NDArray[np.int16]]) -> None:
    examples, asked, right = intents
    written = [
        write_examples(Examples(*part))
        for part in zip(np.array_split(examples.vectors, 4), np.array_split(examples.classes, 4), strict=True)
    ]
    for n_parts in range(1, 5):
        head = fit(read_examples(written[:n_parts]), 16)
    in_parts, at_once = apply(head, asked), apply(fit(examples, 16), asked)
    assert abs((in_parts.argmax(axis=1) == right).mean() - (at_once.argmax(axis=1) == right).mean()) <= 0.01
    close(in_parts, at_once, 1e-6)


def test_products_take_one_thread_from_the_first_on() -> None:
    def blas() -> set[int]:
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    examples = made_up(60, 16, 5)
    with threadpool_limits(2):
        classifiers._use_one_thread.cache_clear()
        head = fit(examples, 5)
        assert blas() == {1}
        apply(head, examples.vectors.astype(np.float32))
        assert blas() == {1}
