"""What `/v1/train` and `/v1/classifiers` answer and refuse. The client checks each answer's shape."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.contract.test_embeddings import LONG
from tests.served import MODEL

EXAMPLES = [
    {"text": "a cat sleeps on the sofa", "label": "animal"},
    {"text": "the dog barks at the postman", "label": "animal"},
    {"text": "shares fell sharply", "label": "money"},
    {"text": "the bank raises its interest rate", "label": "money"},
]


@pytest.fixture(autouse=True)
def _nothing_is_left(client: httpx.Client) -> Iterator[None]:
    yield
    for one in client.get("/v1/classifiers").json():
        client.delete(f"/v1/classifiers/{one['classifier_id']}")


def train(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"input": EXAMPLES, **fields}
    if "classifier_id" not in fields:
        body["model"] = MODEL
    response = client.post("/v1/train", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def refused(client: httpx.Client, **fields: Any) -> httpx.Response:
    response = client.post("/v1/train", json={"input": EXAMPLES, "model": MODEL, **fields})
    assert 400 <= response.status_code < 500, response.text
    return response


def classify(client: httpx.Client, classifier_id: str, *texts: str) -> list[dict[str, Any]]:
    response = client.post("/v1/classify", json={"classifier_id": classifier_id, "input": texts})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def summary(client: httpx.Client, classifier_id: str) -> dict[str, Any]:
    [found] = [one for one in client.get("/v1/classifiers").json() if one["classifier_id"] == classifier_id]
    return found


def n_tokens(client: httpx.Client, *texts: str) -> int:
    usage = client.post("/v1/embeddings", json={"model": MODEL, "input": texts}).json()["usage"]
    return int(usage["total_tokens"])


def test_a_classifier_learns_and_is_asked(client: httpx.Client) -> None:
    made = train(client)
    assert made["num_samples"] == len(EXAMPLES)
    assert made["usage"]["total_tokens"] == n_tokens(client, *(one["text"] for one in EXAMPLES))
    asked = ["the puppy chases a cat", "my savings account"]
    response = client.post("/v1/classify", json={"classifier_id": made["classifier_id"], "input": asked})
    assert [item["prediction"] for item in response.json()["data"]] == ["animal", "money"]
    assert [one["label"] for one in response.json()["data"][0]["predictions"]] == ["animal", "money"]
    assert response.json()["usage"]["total_tokens"] == n_tokens(client, *asked)


def test_the_list_shows_what_happened_to_a_classifier(client: httpx.Client) -> None:
    classifier_id = train(client, access="private")["classifier_id"]
    made = summary(client, classifier_id)
    assert made["model"] == MODEL
    assert made["labels"] == ["animal", "money"]
    assert made["access"] == "private"
    assert (made["updated_number"], made["used_number"], made["used_at"]) == (0, 0, None)
    assert made["created_at"] == made["updated_at"]
    classify(client, classifier_id, "x", "y")
    classify(client, classifier_id, "x")
    train(client, classifier_id=classifier_id, input={"text": "a red rose", "label": "plant"})
    after = summary(client, classifier_id)
    assert (after["updated_number"], after["used_number"]) == (1, 2)
    assert made["created_at"] == after["created_at"] < after["used_at"] < after["updated_at"]
    assert after["labels"] == ["animal", "money", "plant"]
    assert after["metadata_"] == {"num_samples": 5}
    assert client.post("/v1/classifiers").json() == client.get("/v1/classifiers").json()


def test_an_update_keeps_what_was_learned_and_adds_a_label(client: httpx.Client) -> None:
    classifier_id = train(client)["classifier_id"]
    before = classify(client, classifier_id, "the puppy chases a cat", "my savings account")
    new = [{"text": text, "label": "plant"} for text in ("a red rose", "the oak sheds its leaves")]
    assert train(client, classifier_id=classifier_id, input=new)["num_samples"] == 2
    after = classify(client, classifier_id, "the puppy chases a cat", "my savings account", "tulips in the garden")
    assert [item["prediction"] for item in after] == ["animal", "money", "plant"]
    assert [len(item["predictions"]) for item in before + after] == [2, 2, 3, 3, 3]


def test_an_update_teaches_what_training_at_once_would(client: httpx.Client) -> None:
    parts = [EXAMPLES[0::2], EXAMPLES[1:2], EXAMPLES[3:]]
    classifier_id = train(client, input=parts[0])["classifier_id"]
    for part in parts[1:]:
        assert train(client, classifier_id=classifier_id, input=part)["classifier_id"] == classifier_id
    at_once = train(client)["classifier_id"]
    asked = ["the puppy chases a cat", "my savings account", "rain"]
    for one, other in zip(classify(client, classifier_id, *asked), classify(client, at_once, *asked), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=2e-3)


def test_more_steps_learn_more(client: httpx.Client) -> None:
    ids = [train(client, num_iters=steps)["classifier_id"] for steps in (1, 20)]
    one, more = [classify(client, classifier_id, EXAMPLES[0]["text"])[0] for classifier_id in ids]
    assert one["prediction"] == more["prediction"] == "animal"
    assert one["score"] < more["score"]


def test_a_deleted_classifier_is_gone(client: httpx.Client) -> None:
    classifier_id = train(client)["classifier_id"]
    response = client.delete(f"/v1/classifiers/{classifier_id.upper()}")
    assert response.json()["classifier_id"] == classifier_id
    assert client.get("/v1/classifiers").json() == []
    for method, path, body in (
        ("DELETE", f"/v1/classifiers/{classifier_id}", None),
        ("POST", "/v1/classify", {"classifier_id": classifier_id, "input": "x"}),
        ("POST", "/v1/train", {"classifier_id": classifier_id, "input": EXAMPLES}),
    ):
        response = client.request(method, path, json=body)
        assert response.status_code == 404
        assert response.json()["code"] == "RESOURCE_NOT_FOUND"
        assert f"Classifier '{classifier_id}' not found or access denied" in response.json()["detail"]


@pytest.mark.parametrize("classifier_id", ["x", "%00", "..%2F..%2Fetc%2Fpasswd", "'%20OR%201=1--", "0" * 36, "é"])
def test_a_classifier_that_is_not_there_is_not_deleted(client: httpx.Client, classifier_id: str) -> None:
    train(client)
    assert client.delete(f"/v1/classifiers/{classifier_id}").status_code == 404
    assert len(client.get("/v1/classifiers").json()) == 1


def test_a_caller_has_sixteen_classifiers_of_sixteen_labels(client: httpx.Client) -> None:
    sixteen = [{"text": f"{number}", "label": f"{number}"} for number in range(16)]
    classifier_id = train(client, input=sixteen)["classifier_id"]
    for fields in (
        {"input": [*sixteen, {"text": "x", "label": "seventeenth"}]},
        {"input": {"text": "x", "label": "seventeenth"}, "classifier_id": classifier_id},
    ):
        response = refused(client, **fields)
        assert response.status_code == 400
        assert response.json()["code"] == "INPUT_LABEL_LIMIT_EXCEEDED"
        assert "17 labels provided, maximum 16" in response.json()["detail"]
    for _ in range(15):
        train(client)
    response = refused(client)
    assert response.status_code == 403
    assert response.json()["code"] == "AUTHZ_RESOURCE_LIMIT_EXCEEDED"
    assert "maximum 16 classifiers" in response.json()["detail"]
    client.delete(f"/v1/classifiers/{classifier_id}")
    train(client)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (EXAMPLES[:2], "at least two different labels"),
        (EXAMPLES[:1], "at least two different labels"),
        (EXAMPLES[0], "at least two different labels"),
        ([*EXAMPLES, {"text": "x", "label": ""}], "input -> 4"),
        ([*EXAMPLES, {"text": "x", "label": " \t"}], "input -> 4"),
        ([*EXAMPLES, {"text": "x", "label": "l" * 257}], "1 to 256 characters"),
    ],
)
def test_labels_that_nothing_is_learned_from(client: httpx.Client, given: Any, words: str) -> None:
    response = refused(client, input=given)
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_INVALID_LABELS"
    assert words in response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "field", "kind", "words"),
    [
        ({"input": EXAMPLES * 129}, "input", "too_long", ["at most 512"]),
        ({"input": [5] * 513}, "input", "too_long", ["at most 512"]),
        ({"input": []}, "input", "too_short", ["at least 1"]),
        ({"input": "x"}, "input", "dict_type", ['"label"']),
        ({"input": ["x", "y"]}, "input -> 0", "dict_type", ['"label"']),
        ({"input": [{"text": "x"}]}, "input -> 0 -> label", "missing", ["required"]),
        ({"input": [{"text": "x", "label": 3}]}, "input -> 0 -> label", "string_type", ["string"]),
        ({"input": [{"label": "a"}]}, "input -> 0", "value_error", ["exactly one of text"]),
        ({"input": [{"text": "x", "image": "y", "label": "a"}]}, "input -> 0", "value_error", ["exactly one of"]),
        (
            {"input": [*EXAMPLES, {"image": "https://x/y.png", "label": "a"}]},
            "input -> 4",
            "modality",
            ["text only", "image input: none"],
        ),
        ({"access": "secret"}, "access", "literal_error", ["public", "private"]),
        ({"num_iters": 0}, "num_iters", "greater_than_equal", ["1"]),
        ({"num_iters": "10"}, "num_iters", "int_type", ["integer"]),
        ({"model": None}, "model", "missing", ["or classifier_id"]),
        ({"model": 1}, "model", "string_type", ["string"]),
    ],
)
def test_a_wrong_field_is_named(
    client: httpx.Client, fields: dict[str, Any], field: str, kind: str, words: list[str]
) -> None:
    response = refused(client, **fields)
    assert response.status_code == 422
    fault = response.json()["errors"][0]
    assert fault["field"] == f"body -> {field}"
    assert fault["type"] == kind
    assert all(word in fault["message"] for word in words), fault
    assert client.get("/v1/classifiers").json() == []


def test_an_update_that_says_something_else_is_refused(client: httpx.Client) -> None:
    classifier_id = train(client, access="private")["classifier_id"]
    response = refused(client, classifier_id=classifier_id, access="public")
    assert response.json()["errors"][0]["field"] == "body -> access"
    assert refused(client, classifier_id=classifier_id, model="no-such-model").status_code == 400
    response = client.post("/v1/train", json={"classifier_id": classifier_id, "input": EXAMPLES, "model": MODEL})
    assert response.status_code == 200


def test_a_long_example_is_refused_or_cut(client: httpx.Client) -> None:
    given = [*EXAMPLES, {"text": LONG, "label": "animal"}]
    assert refused(client, input=given).json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    response = client.post("/v1/train", json={"model": MODEL, "input": given, "truncate": True})
    assert response.headers["x-truncated-inputs"] == "1"


def test_the_most_examples_are_taken(client: httpx.Client) -> None:
    assert train(client, input=EXAMPLES * 128, num_iters=2**63)["num_samples"] == 512
