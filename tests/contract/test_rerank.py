"""`POST /v1/rerank` of the embedded model: requests of the public specification, and those that nobody means well.

The client checks each answer's shape.
"""

from typing import Any

import httpx
import pytest

from tests.served import MODEL

QUERY = "Climate change impact on renewable energy adoption"
DOCUMENTS = [
    "Rising temperatures accelerate the transition to solar and wind power worldwide.",
    "Le changement climatique et l'énergie renouvelable : une perspective européenne.",
    "Improving accuracy in disease detection and treatment recommendations.",
    "气候变化对可再生能源的影响",
]
LONG = "word " * 200_000


def rerank(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/rerank", json={"model": MODEL, "query": QUERY, "documents": DOCUMENTS, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"return_documents": False, "top_n": 4},  # as v1 and v2 are asked
        {"documents": [{"text": text} for text in DOCUMENTS], "truncation": True},
        {"documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}], "top_n": None, "truncation": None},  # as m0 is
        {"return_documents": False, "return_embeddings": False, "max_doc_length": 2048, "top_n": 4},  # as v3 is
        {"return_documents": None, "return_embeddings": None},
    ],
)
def test_requests_of_the_specification_are_answered(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = rerank(client, **fields)
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert len(results) == len(fields.get("documents", DOCUMENTS))
    assert results[0]["index"] == 0
    assert ("document" in results[0]) is (fields.get("return_documents", True) is not False)


def test_a_name_that_is_null_leaves_the_word_to_the_next(client: httpx.Client) -> None:
    assert len(rerank(client, top_n=None, top_k=1).json()["results"]) == 1
    assert rerank(client, documents=[LONG], truncation=None, truncate=False).status_code == 400


def test_the_model_is_named_as_the_caller_named_it(client: httpx.Client) -> None:
    long = "sentence-transformers/all-MiniLM-L6-v2"
    assert rerank(client, model=long).json()["model"] == long
    assert rerank(client, model=None).json()["model"] == MODEL
    body = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()
    assert body == rerank(client).json()


def test_an_unknown_model_lists_what_is_served(client: httpx.Client) -> None:
    response = rerank(client, model="rerank-v3.5")
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_MODEL_NOT_FOUND"
    assert MODEL in response.json()["detail"]


@pytest.mark.parametrize("missing", ["query", "documents"])
def test_a_missing_field_is_named(client: httpx.Client, missing: str) -> None:
    body = {"model": MODEL, "query": QUERY, "documents": DOCUMENTS}
    del body[missing]
    response = client.post("/v1/rerank", json=body)
    assert response.status_code == 422
    assert response.json()["detail"] == f"{missing}: Field required"


def test_as_many_documents_as_are_taken(client: httpx.Client) -> None:
    results = rerank(client, documents=["", *(f"{number % 50}" for number in range(9_999))]).json()["results"]
    assert sorted(result["index"] for result in results) == list(range(10_000))


def test_a_document_of_a_megabyte_is_cut_or_refused(client: httpx.Client) -> None:
    response = rerank(client, documents=[LONG, "x"], top_n=1, return_documents=False)
    assert response.status_code == 200
    assert response.headers["x-truncated-inputs"] == "1"
    assert rerank(client, documents=["x"], query=LONG).status_code == 200
    response = rerank(client, documents=["x", LONG], truncation=False)
    assert response.status_code == 400
    assert "Document 1 has more than 1640 tokens" in response.json()["detail"]


def test_a_refusal_does_not_send_a_long_value_back(client: httpx.Client) -> None:
    for fields in (
        {"documents": [{"k" * 100_000: 1}]},
        {"documents": "x" * 100_000},
        {"documents": [5] * 100_000},
        {"query": {"k" * 100_000: 1}},
        {"rank_fields": ["x" * 100_000]},
        {"instruction": "x" * 100_000},
    ):
        response = rerank(client, **fields)
        assert response.status_code == 422
        assert len(response.content) < 2_000
