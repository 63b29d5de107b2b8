"""`POST /v1/rerank` on rerankers that are language models: their own scores and fields."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from fundament.core import Rerank
from tests.checkpoints import qwen_reranker
from tests.checkpoints.qwen_reranker import DIM, GENERATIVE, HYBRID, rank
from tests.contract.schemas import conforms
from tests.inprocess import Api, running

YES_NO = "qwen3-reranker-0.6b"
QUERY = "who is the other?"
DOCUMENTS: list[Any] = ["the other", {"text": "in", "id": 7}, "", "naïve 東京", "the other"]
TEXTS = ["the other", "in", "", "naïve 東京", "the other"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("language-models")
    return {
        "listwise": qwen_reranker.write(folder / "listwise", HYBRID, projector=True),
        YES_NO: qwen_reranker.write(folder / "generative", GENERATIVE),
    }


@pytest.fixture(scope="module")
def api(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    named = [f"{name}={path}" for name, path in directories.items()]
    with running(tmp_path_factory.mktemp("data"), models=named, dtype="float32") as api:
        yield api


def post(api: Api, model: str, **fields: Any) -> httpx.Response:
    asked = {"model": model, "query": QUERY, "documents": DOCUMENTS, **fields}
    answer = api.run(api.client.post("/v1/rerank", json=asked))
    api.run(answer.aread())
    conforms(answer)
    return answer


def in_order(answer: httpx.Response) -> list[dict[str, Any]]:
    """The results in the order of the documents."""
    assert answer.status_code == 200, answer.text
    results: list[dict[str, Any]] = answer.json()["results"]
    assert [result["relevance_score"] for result in results] == sorted(
        (result["relevance_score"] for result in results), reverse=True
    )
    return sorted(results, key=lambda result: result["index"])


def scores(answer: httpx.Response) -> list[float]:
    return [result["relevance_score"] for result in in_order(answer)]


@pytest.mark.parametrize("name", ["listwise", YES_NO])
def test_of_a_very_long_document_or_query_a_beginning_is_looked_at(api: Api, name: str) -> None:
    long, shorter = "the other " * 100_000, "the other " * 20_000
    for longs, shorters in (({"documents": [long]}, {"documents": [shorter]}), ({"query": long}, {"query": shorter})):
        refused = post(api, name, **longs, truncation=False)
        assert refused.status_code == 400
        assert " more than " in refused.json()["detail"]
        assert scores(post(api, name, **longs)) == scores(post(api, name, **shorters))


@pytest.mark.parametrize("instruction", [None, "find the other"])
@pytest.mark.parametrize("name", ["listwise", YES_NO])
def test_scores_are_the_models(api: Api, directories: dict[str, Path], name: str, instruction: str | None) -> None:
    model = qwen_reranker.load(directories[name], "listwise" if name == "listwise" else "qwen")
    expected = rank(model, Rerank(query=QUERY, documents=TEXTS, instruction=instruction))
    answer = post(api, name, instruction=instruction)
    found = [result["relevance_score"] for result in in_order(answer)]
    np.testing.assert_allclose(found, expected.scores, atol=1e-5)
    assert answer.json()["usage"] == {"total_tokens": expected.n_tokens}


def test_a_listwise_model_gives_vectors_and_wraps_documents(api: Api) -> None:
    results = in_order(post(api, "listwise", return_embeddings=True))
    assert [result["document"] for result in results] == [{"text": text} for text in TEXTS]
    vectors = np.array([result["embedding"] for result in results])
    assert vectors.shape == (5, DIM)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_model_that_answers_yes_or_no_repeats_documents_and_has_no_vectors(api: Api) -> None:
    results = in_order(post(api, YES_NO))
    assert [result["document"] for result in results] == DOCUMENTS
    assert all(0 <= result["relevance_score"] <= 1 for result in results)
    assert results[0]["relevance_score"] == results[4]["relevance_score"]
    refused = post(api, YES_NO, return_embeddings=True)
    assert refused.status_code == 422
    assert "return_embeddings" in refused.json()["detail"]


@pytest.mark.parametrize("name", ["listwise", YES_NO])
def test_lengths_are_the_callers(api: Api, name: str) -> None:
    short = post(api, name, documents=["in", "in the inner city"], max_doc_length=3, max_query_length=2)
    assert short.headers["X-Truncated-Inputs"] == "1"
    assert in_order(short)
    assert in_order(post(api, name, documents=["in" * 3000], query="<|embed_token|>"))
    refused = post(api, name, documents=["in" * 5000], truncation=False)
    assert refused.status_code == 400
    assert refused.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"


@pytest.mark.parametrize("name", ["listwise", YES_NO])
def test_an_instruction_has_a_longest_length(api: Api, name: str) -> None:
    assert in_order(post(api, name, instruction="a" * 2_000))
    refused = post(api, name, instruction="a" * 2_001)
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "body -> instruction"
    assert "at most 2000 characters" in refused.json()["detail"]
