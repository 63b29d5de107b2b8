"""What `POST /v1/embeddings` refuses, and in which words. The client checks each answer's shape."""

from typing import Any

import httpx
import pytest

from tests.contract.test_embeddings import LONG
from tests.served import MODEL


def refused(client: httpx.Client, **fields: Any) -> httpx.Response:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "x", **fields})
    assert 400 <= response.status_code < 500, response.text
    return response


@pytest.mark.parametrize(
    ("fields", "field", "kind", "words"),
    [
        ({"dimensions": 385}, "dimensions", "less_than_equal", ["Input should be less than or equal to 384"]),
        ({"dimensions": 2**62}, "dimensions", "less_than_equal", ["Input should be less than or equal to 384"]),
        ({"dimensions": 64}, "dimensions", "greater_than_equal", ["cannot be cut", "384"]),
        ({"dimensions": 0}, "dimensions", "greater_than", ["greater than 0"]),
        ({"dimensions": "384"}, "dimensions", "int_type", ["integer"]),
        ({"late_chunking": True}, "late_chunking", "value_error", ["does not support late_chunking"]),
        ({"return_multivector": True}, "return_multivector", "value_error", ["one vector per input"]),
        ({"input": {"image": "https://x/y.png"}}, "input -> 0", "modality", ["text only", "image input: none"]),
        ({"input": {"url": "https://x/y.png"}}, "input -> 0", "modality", ["text only", "image input: none"]),
        ({"input": ["x", {"pdf": "AAAA"}]}, "input -> 1", "modality", ["text only", "pdf input: none"]),
        ({"input": ["x", {"video": "AAAA"}]}, "input -> 1", "modality", ["text only", "video input: none"]),
        ({"input": {"audio": "AAAA"}}, "input -> 0", "modality", ["text only", "audio input: none"]),
        (
            {"input": [{"content": [{"text": "a"}, {"image": "AAAA"}]}]},
            "input -> 0",
            "modality",
            ["text only", "groups of parts: none"],
        ),
        ({"input": [[1, 2], [3]]}, "input -> 0", "string_type", ["Token ids", "Send the text"]),
        ({"input": [1, 2, 3]}, "input -> 0", "string_type", ["Token ids", "Send the text"]),
        ({"input": []}, "input", "too_short", ["at least 1"]),
        ({"input": {}}, "input", "value_error", ["exactly one of text"]),
        ({"input": {"text": "a", "image": "b"}}, "input", "value_error", ["exactly one of text"]),
        ({"input": {"text": 5}}, "input -> text", "string_type", ["string"]),
        ({"input": ["x", None]}, "input -> 1", "string_type", ["string or an object"]),
        ({"input": True}, "input", "string_type", ["string or an object"]),
        ({"embedding_type": "int8"}, "embedding_type", "literal_error", ["float", "base64", "binary", "ubinary"]),
        ({"encoding_format": []}, "encoding_format", "too_short", ["at least 1"]),
        ({"normalized": "maybe"}, "normalized", "bool_type", ["boolean"]),
        ({"task": 3}, "task", "string_type", ["string"]),
        ({"model": ""}, "model", "string_too_short", ["at least 1"]),
        ({"model": None}, "model", "string_type", ["string"]),
    ],
)
def test_a_wrong_field_is_named(
    client: httpx.Client, fields: dict[str, Any], field: str, kind: str, words: list[str]
) -> None:
    response = refused(client, **fields)
    assert response.status_code == 422
    fault = response.json()["errors"][0]
    assert fault["field"].startswith(f"body -> {field}")
    assert fault["type"] == kind
    for word in words:
        assert word in fault["message"]
        assert word in response.json()["detail"]
    assert field in response.json()["detail"]


def test_several_wrong_fields_are_all_named(client: httpx.Client) -> None:
    response = refused(client, dimensions="many", truncate="no", task=1)
    assert {fault["field"] for fault in response.json()["errors"]} == {
        "body -> dimensions",
        "body -> truncate",
        "body -> task",
    }


@pytest.mark.parametrize("missing", ["model", "input"])
def test_a_missing_field_is_named(client: httpx.Client, missing: str) -> None:
    body = {"model": MODEL, "input": "x"}
    del body[missing]
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 422
    assert response.json()["detail"] == f"{missing}: Field required"


def test_a_text_longer_than_the_context_is_refused_with_the_way_out(client: httpx.Client) -> None:
    response = refused(client, input=["short", LONG])
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    for part in ("Input 1", "302 tokens", "256 tokens", "truncate: true", "smaller chunks"):
        assert part in response.json()["detail"]


def test_an_unknown_model_lists_what_is_served(client: httpx.Client) -> None:
    response = refused(client, model="no-such-model")
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_MODEL_NOT_FOUND"
    assert "'no-such-model' not found" in response.json()["detail"]
    assert MODEL in response.json()["detail"]


def test_a_refusal_does_not_send_a_long_value_back(client: httpx.Client) -> None:
    for fields in (
        {"model": "m" * 100_000},
        {"input": {"k" * 100_000: 1}},
        {"embedding_type": ["x" * 100_000] * 100},
        {"embedding_type": [1] * 100_000},
        {"task": ["x" * 100_000]},
    ):
        assert len(refused(client, **fields).content) < 2_000
