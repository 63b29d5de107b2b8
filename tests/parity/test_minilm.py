"""The embedded model against sentence-transformers in float32."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from fundament.core import Embed, Model
from fundament.engine.local import finish
from fundament.engine.weights import Local

WORDS = ["the", "search", "engine", "finds", "mean", "naïve", "東京", "déjà", "vu", "🙂", "tokenization"]


@pytest.fixture(scope="module")
def reference(minilm: Local) -> SentenceTransformer:
    return SentenceTransformer(str(minilm.directory), device="cpu")


def texts_of_many_lengths() -> list[str]:
    """From one token to more than the context."""
    generator = np.random.default_rng(7)
    lengths = [1, 1, 2, 3, 5, 8, 16, 33, 64, 100, 200, 254, 255, 400]
    return [" ".join(generator.choice(WORDS, n)) for n in lengths] + ["", " ", "a", "\x00"]


def vectors(model: Model, texts: list[str]) -> np.ndarray:
    call = Embed(inputs=texts, truncate=True)
    items = model.prepare(call)
    found = finish(model, call, items, model.forward(items)).vectors.astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    b = b.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(b, axis=1)


def test_float32_equals_the_reference(minilm_float32: Model, reference: SentenceTransformer) -> None:
    texts = texts_of_many_lengths()
    expected = torch.from_numpy(reference.encode(texts))
    torch.testing.assert_close(torch.from_numpy(vectors(minilm_float32, texts)).float(), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_close_to_the_reference(minilm_bfloat16: Model, reference: SentenceTransformer) -> None:
    texts = texts_of_many_lengths()
    assert cosines(vectors(minilm_bfloat16, texts), reference.encode(texts)).min() >= 0.9998


@settings(deadline=None, max_examples=30)
@given(inputs=st.lists(st.text(max_size=200), min_size=1, max_size=13))
def test_bfloat16_in_any_company_is_close_to_the_reference(
    minilm_bfloat16: Model, reference: SentenceTransformer, inputs: list[str]
) -> None:
    assert cosines(vectors(minilm_bfloat16, inputs), reference.encode(inputs)).min() >= 0.9998


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(inputs=st.lists(st.text(max_size=400), min_size=2, max_size=13))
def test_a_row_alone_equals_the_row_in_any_company(
    minilm_float32: Model, minilm_bfloat16: Model, inputs: list[str]
) -> None:
    for model, least in ((minilm_float32, 0.9999999), (minilm_bfloat16, 0.9999)):
        alone = np.concatenate([vectors(model, [text]) for text in inputs])
        assert cosines(alone, vectors(model, inputs)).min() >= least
