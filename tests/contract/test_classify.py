"""What `POST /v1/classify` answers and refuses. The client checks each answer's shape."""

from typing import Any

import httpx
import numpy as np
import pytest

from tests.contract.test_embeddings import LONG
from tests.served import MODEL

INPUTS = ["the cat sat on the mat", "shares fell after the central bank spoke"]
LABELS = ["animals", "finance", "weather"]


def classified(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/classify", json={"model": MODEL, "input": INPUTS, "labels": LABELS, **fields})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def refused(client: httpx.Client, **fields: Any) -> httpx.Response:
    response = client.post("/v1/classify", json={"model": MODEL, "input": "x", "labels": LABELS, **fields})
    assert 400 <= response.status_code < 500, response.text
    return response


def embedded(client: httpx.Client, texts: list[str]) -> tuple[Any, int]:
    body = client.post("/v1/embeddings", json={"model": MODEL, "input": texts}).json()
    return np.array([item["embedding"] for item in body["data"]]), body["usage"]["total_tokens"]


def scores(item: dict[str, Any]) -> list[float]:
    return [one["score"] for one in item["predictions"]]


def test_scores_are_the_softmax_of_cosines_and_labels_keep_their_order(client: httpx.Client) -> None:
    body = classified(client)
    (inputs, n_inputs), (labels, n_labels) = embedded(client, INPUTS), embedded(client, LABELS)
    expected = np.exp(inputs @ labels.T)
    expected /= expected.sum(axis=1, keepdims=True)
    for item, row in zip(body["data"], expected, strict=True):
        assert [one["label"] for one in item["predictions"]] == LABELS
        np.testing.assert_allclose(scores(item), row, atol=1e-3)
    assert [item["prediction"] for item in body["data"]] == ["animals", "finance"]
    assert body["usage"]["total_tokens"] == n_inputs + n_labels


def test_groups_are_classified_each_on_its_own(client: httpx.Client) -> None:
    groups = {"topic": LABELS, "form": ["poem", "news"], "": ["animals", "news"]}
    alone = {name: classified(client, labels=labels)["data"] for name, labels in groups.items()}
    body = classified(client, labels=groups)
    for index, item in enumerate(body["data"]):
        assert list(item["predictions"]) == list(groups)
        for name, labels in groups.items():
            assert [one["label"] for one in item["predictions"][name]] == labels
            found = [one["score"] for one in item["predictions"][name]]
            np.testing.assert_allclose(found, scores(alone[name][index]), atol=1e-3)
    _, n_inputs = embedded(client, INPUTS)
    _, n_labels = embedded(client, [*LABELS, "poem", "news"])  # each distinct label is read once
    assert body["usage"]["total_tokens"] == n_inputs + n_labels


def test_an_input_alone_is_classified_as_in_company(client: httpx.Client) -> None:
    together = classified(client, input=[*INPUTS, LONG[:300]])["data"]
    for text, item in zip(INPUTS, together, strict=False):
        for form in (text, {"text": text}, [text], [{"text": text}]):
            [alone] = classified(client, input=form)["data"]
            np.testing.assert_allclose(scores(alone), scores(item), atol=1e-3)


def test_a_label_that_is_given_twice_counts_once(client: httpx.Client) -> None:
    once, twice = classified(client), classified(client, labels=[*LABELS, "finance", "animals"])
    assert once == twice


def test_unknown_fields_and_nulls_are_ignored(client: httpx.Client) -> None:
    assert classified(client, action="list", classifier_id=None, truncate=None, task="retrieval.query") == classified(
        client
    )


def test_a_long_input_is_refused_or_cut(client: httpx.Client) -> None:
    response = refused(client, input=["x", LONG])
    assert response.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    assert "Input 1" in response.json()["detail"]
    response = client.post("/v1/classify", json={"model": MODEL, "input": LONG, "labels": LABELS, "truncate": True})
    assert response.headers["x-truncated-inputs"] == "1"


def test_the_most_inputs_and_labels_are_taken(client: httpx.Client) -> None:
    labels = [f"{number}" for number in range(512)]
    assert len(classified(client, input=["x"] * 512)["data"]) == 512
    assert len(classified(client, input="x", labels=labels)["data"][0]["predictions"]) == 512
    groups = {f"{group}": labels[64 * group : 64 * group + 64] for group in range(8)}
    assert list(classified(client, input="x", labels=groups)["data"][0]["prediction"]) == list(groups)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([f"{number}" for number in range(513)], ["513 labels", "maximum 512"]),
        ({"g": [f"{number}" for number in range(65)]}, ["65 labels", "maximum 64"]),
        ({f"{number}": ["a", "b"] for number in range(9)}, ["9 groups", "maximum 8"]),
    ],
)
def test_too_many_labels(client: httpx.Client, labels: Any, words: list[str]) -> None:
    response = refused(client, labels=labels)
    assert response.status_code == 400
    assert response.json()["code"] == "INPUT_LABEL_LIMIT_EXCEEDED"
    assert all(word in response.json()["detail"] for word in words)


@pytest.mark.parametrize(
    ("fields", "field", "kind", "words"),
    [
        ({"input": ["x"] * 513}, "input", "too_long", ["at most 512", "513"]),
        ({"input": []}, "input", "too_short", ["at least 1"]),
        ({"input": [[1, 2]]}, "input -> 0", "string_type", ["Token ids"]),
        ({"input": {"image": "https://x/y.png"}}, "input -> 0", "modality", ["text only", "image input: none"]),
        ({"labels": []}, "labels", "too_short", ["at least 1"]),
        ({"labels": {}}, "labels", "too_short", ["at least one group"]),
        ({"labels": {"g": []}}, "labels -> g", "too_short", ["at least 1"]),
        ({"labels": {"g": "a"}}, "labels -> g", "list_type", ["list of labels"]),
        ({"labels": "a"}, "labels", "list_type", ["list of labels"]),
        ({"labels": 7}, "labels", "list_type", ["list of labels"]),
        ({"labels": ["a", 7]}, "labels -> 1", "string_type", ["some text"]),
        ({"labels": ["a", None]}, "labels -> 1", "string_type", ["some text"]),
        ({"labels": ["a", " \n"]}, "labels -> 1", "string_type", ["some text"]),
        ({"labels": ["a", LONG]}, "labels", "too_long", ["302 tokens", "256"]),
        ({"labels": None}, "labels", "missing", ["give model and labels, or classifier_id"]),
        ({"model": None}, "model", "missing", ["give model and labels, or classifier_id"]),
        ({"model": 3}, "model", "string_type", ["string"]),
        ({"truncate": "yes"}, "truncate", "bool_type", ["boolean"]),
        ({"classifier_id": "x"}, "labels", "value_error", ["its own labels"]),
        ({"classifier_id": 7}, "classifier_id", "string_type", ["string"]),
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
    assert len(response.content) < 2_000


def test_an_unknown_model_lists_what_is_served(client: httpx.Client) -> None:
    response = refused(client, model="no-such-model")
    assert response.json()["code"] == "INPUT_MODEL_NOT_FOUND"
    assert MODEL in response.json()["detail"]


@pytest.mark.parametrize(
    "classifier_id",
    ["", "x", "../../etc/passwd", "' OR 1=1 --", "\u0000", "é" * 36, "0" * 36, "00000000-0000-4000-8000-000000000000"],
)
def test_a_classifier_that_is_not_there(client: httpx.Client, classifier_id: str) -> None:
    response = client.post("/v1/classify", json={"classifier_id": classifier_id, "input": "x"})
    assert response.status_code == 404
    assert response.json()["code"] == "RESOURCE_NOT_FOUND"
    assert f"Classifier '{classifier_id}' not found or access denied" in response.json()["detail"]
