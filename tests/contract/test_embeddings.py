"""`POST /v1/embeddings`: what it answers, for every form of the request. The client checks each answer's shape."""

import base64
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from fundament.engine.weights import Local
from tests.served import MODEL

CONTEXT, DIM = 256, 384
LONG = "hello " * 300  # 302 tokens
TEXTS = ["one", "two words", "naïve 東京 🙂"]


def embed(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/embeddings", json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def vectors(client: httpx.Client, **fields: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in embed(client, **fields)["data"]], dtype=np.float32)


def test_floats_are_unit_vectors_of_the_models_dimension(client: httpx.Client) -> None:
    found = vectors(client, input=TEXTS)
    assert found.shape == (3, DIM)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_the_model_is_named_as_the_caller_named_it(client: httpx.Client) -> None:
    long = "sentence-transformers/all-MiniLM-L6-v2"
    assert embed(client, input="x")["model"] == MODEL
    assert embed(client, input="x", model=long)["model"] == long


@pytest.mark.parametrize("given", ["one", {"text": "one"}, ["one"], [{"text": "one"}], {"text": "one", "id": 7}])
def test_every_form_of_a_text_gives_the_same_vector(client: httpx.Client, given: Any) -> None:
    np.testing.assert_allclose(vectors(client, input=given), vectors(client, input="one"), atol=1e-6)


def test_vectors_come_in_the_order_of_the_inputs(client: httpx.Client) -> None:
    texts = ["word " * n for n in (90, 1, 40, 200, 3, 120, 7)]
    together = vectors(client, input=texts)
    alone = np.concatenate([vectors(client, input=text) for text in texts])
    assert ((together @ alone.T).argmax(axis=1) == np.arange(len(texts))).all()
    assert np.diag(together @ alone.T).min() > 0.999


def test_an_empty_text_has_a_vector(client: httpx.Client) -> None:
    found = embed(client, input=[""])
    assert len(found["data"][0]["embedding"]) == DIM
    assert found["usage"]["total_tokens"] == 2  # the special tokens around it


def test_usage_counts_the_models_own_tokens(client: httpx.Client, minilm: Local) -> None:
    tokenizer = Tokenizer.from_file(str(minilm.directory / "tokenizer.json"))
    tokenizer.no_padding()
    expected = sum(len(tokenizer.encode(text).ids) for text in TEXTS)
    assert embed(client, input=TEXTS)["usage"]["total_tokens"] == expected


def test_all_encodings_of_one_vector_agree(client: httpx.Client) -> None:
    data = embed(client, input=TEXTS, embedding_type=["float", "base64", "binary", "ubinary"])["data"]
    for item in data:
        written = item["embedding"]
        assert list(written) == ["float", "base64", "binary", "ubinary"]
        floats = np.array(written["float"], dtype=np.float32)
        assert base64.b64decode(written["base64"]) == floats.astype("<f4").tobytes()
        bits = "".join("1" if number > 0 else "0" for number in floats)
        octets = [int(bits[start : start + 8], 2) for start in range(0, DIM, 8)]
        assert written["ubinary"] == octets
        assert written["binary"] == [octet - 128 for octet in octets]


@pytest.mark.parametrize("encoding", ["float", "base64", "binary", "ubinary"])
def test_one_encoding_in_a_list_is_the_bare_encoding(client: httpx.Client, encoding: str) -> None:
    bare = embed(client, input="x", embedding_type=encoding)["data"]
    assert embed(client, input="x", embedding_type=[encoding])["data"] == bare
    assert embed(client, input="x", embedding_type=[encoding, encoding])["data"] == bare


@pytest.mark.parametrize("name", ["embedding_type", "encoding_format", "encoding_type", "embedding_types"])
def test_every_name_of_the_encoding_is_read(client: httpx.Client, name: str) -> None:
    [item] = embed(client, input="x", **{name: "base64"})["data"]
    assert len(base64.b64decode(item["embedding"])) == 4 * DIM
    [item] = embed(client, input="x", **{name: None})["data"]
    assert len(item["embedding"]) == DIM


def test_a_name_that_is_null_leaves_the_word_to_the_next(client: httpx.Client) -> None:
    [item] = embed(client, input="x", embedding_type=None, encoding_format="base64")["data"]
    assert len(base64.b64decode(item["embedding"])) == 4 * DIM


def test_normalized_false_leaves_the_length(client: httpx.Client) -> None:
    plain, unit = vectors(client, input="x", normalized=False), vectors(client, input="x", normalized=True)
    length = float(np.linalg.norm(plain))
    assert abs(length - 1) > 0.01
    np.testing.assert_allclose(plain / length, unit, atol=1e-6)


def test_truncate_reads_as_much_as_the_context(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": [LONG, "x", LONG], "truncate": True})
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] == 2 * CONTEXT + 3
    assert response.headers["x-truncated-inputs"] == "2"
    whole = "hello " * (CONTEXT - 2)
    np.testing.assert_allclose(
        response.json()["data"][0]["embedding"], vectors(client, input=whole)[0], rtol=0, atol=0.01
    )


def test_nothing_is_truncated_where_everything_fits(client: httpx.Client) -> None:
    whole = "hello " * (CONTEXT - 2)
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": whole})
    assert response.status_code == 200
    assert response.json()["usage"]["total_tokens"] == CONTEXT
    assert response.headers["x-truncated-inputs"] == "0"


@pytest.mark.parametrize(
    "fields",
    [
        {"task": None},
        {"task": "retrieval.query"},  # a model without tasks ignores one
        {"late_chunking": False},
        {"return_multivector": False},
        {"dimensions": DIM},
        {"dimensions": None},
        {"normalized": None, "truncate": None, "late_chunking": None},
        {"user": "somebody", "input_type": "search_query", "prompt_name": "query", "anything": {"else": [1]}},
    ],
)
def test_what_the_model_does_not_take_is_ignored(client: httpx.Client, fields: dict[str, Any]) -> None:
    np.testing.assert_allclose(vectors(client, input="x", **fields), vectors(client, input="x"), atol=1e-6)
