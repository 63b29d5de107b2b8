"""`late_chunking` over HTTP: which vectors come back, what is counted, what is refused and in which words."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tests.checkpoints import jina_v3, llama, qwen
from tests.checkpoints.xlm_roberta import HIDDEN, xlm_roberta
from tests.contract.schemas import conforms
from tests.inprocess import Api, running

MODEL = "jina-embeddings-v3"
TEXT = "Berlin is the capital of Germany. Its population is 3.85 million. The city is known for its history."


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("late")
    directories = {
        MODEL: jina_v3.woven(root / "v3"),
        "bge-m3": xlm_roberta(root / "bge"),
        "qwen3-embedding-0.6b": llama.save(root / "qwen", qwen.QWEN3, qwen.weights(qwen.QWEN3)),
    }
    named = [f"{name}={directory}" for name, directory in directories.items()]
    dims = {MODEL: HIDDEN, "bge-m3": HIDDEN, "qwen3-embedding-0.6b": 32}
    with running(root, dims=dims, models=named, preload=False, dtype="float32") as api:
        yield api


def ask(api: Api, given: Any, **fields: Any) -> httpx.Response:
    response = api.post(orjson.dumps({"model": MODEL, "input": given, "late_chunking": True} | fields))
    conforms(response)
    return response


def vectors(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return np.array([item["embedding"] for item in data])


@pytest.mark.parametrize("given", [[TEXT], [{"text": TEXT}], [TEXT, "the end"]])
def test_a_list_has_a_vector_per_input(api: Api, given: Any) -> None:
    assert len(vectors(ask(api, given, task="retrieval.passage"))) == len(given)


@pytest.mark.parametrize("given", [TEXT, {"text": TEXT}])
def test_a_text_by_itself_has_a_vector_per_sentence(api: Api, given: Any) -> None:
    found = vectors(ask(api, given, task="retrieval.passage"))
    assert len(found) == 3
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_several_texts_have_a_vector_each_out_of_one_reading(api: Api) -> None:
    texts = ["the search. the end.", "what people"]
    response = ask(api, texts, normalized=False)
    found = vectors(response)
    assert found.shape == (2, jina_v3.HIDDEN)
    apart = [ask(api, [text], late_chunking=False).json()["usage"]["total_tokens"] for text in texts]
    assert response.json()["usage"]["total_tokens"] == sum(apart) - 2, "the special tokens are read once"
    assert np.abs(found - vectors(ask(api, texts, normalized=False, late_chunking=False))).max() > 0.01


def test_each_vector_is_cut_and_written_as_asked(api: Api) -> None:
    whole = vectors(ask(api, TEXT, normalized=False))
    cut = vectors(ask(api, TEXT, dimensions=16))
    np.testing.assert_allclose(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True), atol=1e-5)
    written = ask(api, TEXT, embedding_type="ubinary").json()["data"][1]["embedding"]
    assert written == np.packbits(whole[1] > 0).tolist()


def test_what_does_not_fit_is_refused_or_read_in_windows(api: Api) -> None:
    texts = ["the " * 5_000, "what " * 5_000]
    response = ask(api, texts)
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    for part in ("maximum of 8194 tokens", "truncate: true", "late_chunking_window"):
        assert part in response.json()["detail"]
    lost = ask(api, ["the " * 9_000, "what", "end"], truncate=True)
    assert lost.status_code == 400
    assert "nothing is left of input 1" in lost.json()["detail"]
    for given in ("the " * 500_000, ["the " * 500_000]):
        assert "more than" in ask(api, given).json()["detail"]
        cut = vectors(ask(api, ["the " * 9_000], truncate=True))
        assert np.array_equal(vectors(ask(api, given, truncate=True)), cut)
    assert len(vectors(ask(api, ["the " * 300, "what " * 300], late_chunking_window=128))) == 2


def test_truncate_tells_what_was_cut(api: Api) -> None:
    response = ask(api, ["the", "what " * 9_000], truncate=True)
    assert len(vectors(response)) == 2
    assert response.headers["x-truncated-inputs"] == "1"
    assert response.json()["usage"]["total_tokens"] == 8194


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"model": "bge-m3"}, "late_chunking", ["bge-m3", "embedding space collapses", "jina-embeddings-v3"]),
        ({"model": "qwen3-embedding-0.6b"}, "late_chunking", ["qwen3", "pools the last token", "jina-embeddings-v4"]),
        ({"late_chunking_window": 8195}, "late_chunking_window", ["to 8194 tokens"]),
        ({"late_chunking_window": 1}, "late_chunking_window", ["from 34"]),
        ({"late_chunking_window": 0}, "late_chunking_window", ["greater than 0"]),
        ({"late_chunking_window": 64, "late_chunking": False}, "late_chunking_window", ["late_chunking: true"]),
        ({"input": ["a", ""]}, "input -> 1", ["no tokens"]),
    ],
)
def test_a_wrong_field_is_named(api: Api, fields: dict[str, Any], field: str, words: list[str]) -> None:
    response = ask(api, fields.pop("input", TEXT), **fields)
    assert response.status_code == 422
    fault = response.json()["errors"][0]
    assert fault["field"] == f"body -> {field}"
    assert all(word in fault["message"] for word in words)
