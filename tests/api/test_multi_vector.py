"""One vector per token, and weights of tokens, over HTTP."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.checkpoints.bge_m3 import bge_m3
from tests.checkpoints.colbert import DIM, colbert_v2
from tests.checkpoints.splade import splade, with_idf
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

TEXTS = ["the search, engine", {"text": "a?"}]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("multi")
    splade(folder / "splade", "bert")
    splade(folder / "idf", "bert")
    models = {
        "colbert": colbert_v2(folder / "colbert"),
        "bge": bge_m3(folder / "bge"),
        "sparse": folder / "splade",
        "idf": with_idf(folder / "idf", {"search": 7.25}),
    }
    named = [f"{name}={path}" for name, path in models.items()]
    with running(folder / "data", models=[*named, MODEL], dtype="float32") as api:
        yield api


def post(api: Api, model: str, given: Any = TEXTS, path: str = "/v1/embeddings", **fields: Any) -> httpx.Response:
    answer = api.run(api.client.post(path, json={"model": model, "input": given, **fields}))
    api.run(answer.aread())
    conforms(answer)
    return answer


def rows(answer: httpx.Response) -> list[np.ndarray]:
    return [np.array(item["embeddings"], dtype=np.float32) for item in answer.json()["data"]]


def test_a_model_that_gives_nothing_else_gives_vectors_per_token(api: Api) -> None:
    answer = post(api, "colbert")
    assert answer.status_code == 200
    assert list(answer.json()["data"][0]) == ["object", "index", "embeddings"]
    for vectors in rows(answer):
        assert vectors.shape[1] == DIM
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert answer.headers["x-truncated-inputs"] == "0"


@pytest.mark.parametrize("path", ["/v1/multi-vector", "/v1/multi-embeddings"])
@pytest.mark.parametrize("model", ["colbert", "bge"])
def test_the_other_routes_are_the_same_verb(api: Api, path: str, model: str) -> None:
    expected = post(api, model, return_multivector=True)
    assert post(api, model, path=path).content == expected.content


def test_queries_and_documents_are_read_in_two_ways(api: Api) -> None:
    query = post(api, "colbert", input_type="query", return_tokenized_input=True)
    document = post(api, "colbert", input_type="document", return_tokenized_input=True)
    assert post(api, "colbert", return_tokenized_input=True).content == document.content
    for task in ("retrieval.query", "anything"):  # it has none, and ignores one
        assert post(api, "colbert", task=task, return_tokenized_input=True).content == document.content
    assert [len(vectors) for vectors in rows(query)] == [32, 32]
    tokens = [item["tokenized_input"] for item in document.json()["data"]]
    assert [len(named) for named in tokens] == [len(vectors) for vectors in rows(document)]
    assert tokens[0][:2] == ["<s>", "[DocumentMarker]"]
    assert "," not in tokens[0]
    assert query.json()["usage"] == document.json()["usage"]


def test_encodings_hold_the_same_numbers(api: Api) -> None:
    expected = rows(post(api, "colbert"))
    kinds = ["float", "base64", "binary", "ubinary"]
    together = post(api, "colbert", embedding_type=kinds).json()["data"]
    for kind in kinds:
        for item, every, vectors in zip(
            post(api, "colbert", embedding_type=kind).json()["data"], together, expected, strict=True
        ):
            assert every["embeddings"][kind] == item["embeddings"]
            given = item["embeddings"]
            match kind:
                case "float":
                    found, other = np.array(given, dtype=np.float32), vectors
                case "base64":
                    assert all(isinstance(text, str) for text in given)
                    found = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in given])
                    other = vectors
                case _:
                    bytes_ = np.array(given) + (128 if kind == "binary" else 0)
                    found, other = np.unpackbits(bytes_.astype(np.uint8), axis=1)[:, :DIM], vectors > 0
            np.testing.assert_array_equal(found, other)


def test_weights_are_the_heaviest_first(api: Api) -> None:
    for answer in (post(api, "sparse"), post(api, "bge", return_sparse=True), post(api, "sparse", return_sparse=True)):
        for index, item in enumerate(answer.json()["data"]):
            assert (item["object"], item["index"]) == ("embedding", index)
            weights = list(item["embedding"].values())
            assert weights == sorted(weights, reverse=True)
        assert answer.json()["usage"]["prompt_tokens"] > 0


def test_a_task_says_the_side_of_the_search_where_no_input_type_does(api: Api) -> None:
    query = post(api, "idf", "the search", task="retrieval.query")
    assert query.json()["data"][0]["embedding"] == {"search": 7.25}
    document = post(api, "idf", "the search", task="retrieval.query", input_type="document")
    assert document.json()["data"] == post(api, "idf", "the search").json()["data"] != query.json()["data"]


def test_openai_clients_ask_for_base64_and_get_weights(api: Api) -> None:
    expected = post(api, "sparse").json()["data"]
    assert post(api, "sparse", encoding_format="base64").json()["data"] == expected


def test_elser_counts_input_and_output(tmp_path: Path) -> None:
    splade(tmp_path / "elser", "bert")
    with running(tmp_path / "data", models=[f"elser-v2={tmp_path / 'elser'}"]) as api:
        refused = api.app.state.parts.not_ready()
        assert refused is not None
        assert "has positions for 130 tokens, elser-v2 reads 512" in refused
    splade(tmp_path / "elser", "bert", n_positions=512)
    with running(tmp_path / "data", models=[f"elser-v2={tmp_path / 'elser'}"]) as api:
        answer = post(api, "elser-v2", ["the", "search a"], task="retrieval.query")
        assert answer.status_code == 200
        usage = answer.json()["usage"]
        assert list(usage) == ["total_tokens", "input_tokens", "output_tokens"]
        assert usage["total_tokens"] == usage["input_tokens"] == 3 + 4
        assert post(api, "elser-v2", task="classification").status_code == 422


@pytest.mark.parametrize(
    ("model", "fields", "field", "words"),
    [
        (MODEL, {"return_multivector": True}, "return_multivector", "gives one vector per input, not one vector per"),
        (MODEL, {"return_sparse": True}, "return_sparse", "gives one vector per input, not a weight per token"),
        ("colbert", {"return_sparse": True}, "return_sparse", "gives one vector per token, not a weight"),
        ("bge", {"return_sparse": True, "return_multivector": True}, "return_sparse", "ask for one of them"),
        ("bge", {"return_tokenized_input": True}, "return_tokenized_input", "requires return_multivector"),
        (
            "bge",
            {"return_multivector": True, "dimensions": 48},
            "dimensions",
            "be used with one vector per token",
        ),
        ("sparse", {"dimensions": 20}, "dimensions", "cannot be used with a weight per token"),
        ("sparse", {"embedding_type": "binary"}, "embedding_type", "have no bits"),
        ("colbert", {"dimensions": DIM + 1}, "dimensions", f"less than or equal to {DIM}"),
        ("colbert", {"dimensions": DIM - 1}, "dimensions", "cannot be cut"),
        ("colbert", {"input_type": "passage"}, "input_type", "'query' or 'document'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    api: Api, model: str, fields: dict[str, Any], field: str, words: str
) -> None:
    answer = post(api, model, **fields)
    assert answer.status_code == 422
    [fault] = answer.json()["errors"]
    assert fault["field"] == f"body -> {field}"
    assert words in fault["message"]


def test_colbert_vectors_are_cut_then_scaled(tmp_path: Path) -> None:
    colbert_v2(tmp_path / "colbert", {"query_maxlen": 32}, dim=128)
    with running(tmp_path / "data", models=[f"jina-colbert-v2={tmp_path / 'colbert'}"], dtype="float32") as api:
        whole, short = rows(post(api, "jina-colbert-v2")), rows(post(api, "jina-colbert-v2", dimensions=64))
        for vectors, cut in zip(whole, short, strict=True):
            expected = vectors[:, :64] / np.linalg.norm(vectors[:, :64], axis=1, keepdims=True)
            np.testing.assert_allclose(cut, expected, atol=1e-6)
        path = "/v1/multi-vector"
        assert len(rows(post(api, "jina-colbert-v2", path=path, dimensions=96))[0][0]) == 96
        refused = post(api, "jina-colbert-v2", dimensions=100).json()
        assert refused["detail"] == "dimensions: Input should be one of 64, 96, 128."


def test_dense_vectors_of_a_model_that_gives_more(api: Api) -> None:
    assert post(api, "bge", dimensions=48, input_type="anything").json()["data"][0]["object"] == "embedding"
