"""Whatever JSON arrives at classification and training, the answer is right or a refusal, never a failure of ours."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

words = st.sampled_from([MODEL, "a", "b", "public", "private", "", "\u0000"]) | st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | words
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["text", "label", "image"]) | words, inner, max_size=3)
    ),
    max_leaves=8,
)
examples = st.lists(st.fixed_dictionaries({"text": words, "label": words}), min_size=1, max_size=6)
labels = st.lists(words, max_size=4)


def bodies(known: dict[str, st.SearchStrategy[Any]], other: list[str]) -> st.SearchStrategy[bytes]:
    """Bodies that nearly fit, and bodies that do not."""
    near = st.fixed_dictionaries({}, optional=known | dict.fromkeys(other, values))
    wild = st.dictionaries(st.sampled_from([*known, *other]) | words, values, max_size=5)
    return (near | wild | values).map(orjson.dumps) | st.binary(max_size=100)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("data")) as api:
        yield api


@pytest.fixture(scope="module")
def classifier_id(api: Api) -> str:
    body = {"model": MODEL, "input": [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]}
    found: str = api.run(api.client.post("/v1/train", json=body)).json()["classifier_id"]
    return found


def send(api: Api, path: str, content: bytes) -> None:
    response = api.run(api.client.post(path, content=content))
    assert response.status_code < 500, response.text
    conforms(response)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=bodies(
        {
            "model": st.just(MODEL) | words,
            "input": words | st.lists(words, max_size=3),
            "labels": labels | st.dictionaries(words, labels, max_size=3),
        },
        ["classifier_id", "truncate"],
    )
)
@example(content=orjson.dumps({"model": MODEL, "input": "x", "labels": {"": ["\u0000", " a", "a"]}}))
@example(content=orjson.dumps({"model": MODEL, "input": "x", "labels": [[]]}))
def test_any_body_of_a_classification(api: Api, content: bytes) -> None:
    send(api, "/v1/classify", content)


@settings(deadline=None, max_examples=50)
@given(given=values)
def test_any_input_of_a_trained_classifier(api: Api, classifier_id: str, given: Any) -> None:
    send(api, "/v1/classify", orjson.dumps({"classifier_id": classifier_id, "input": given}))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=bodies(
        {
            "model": st.just(MODEL) | words,
            "input": examples,
            "access": words,
            "num_iters": st.integers(-1, 2**64 - 1),
        },
        ["classifier_id", "truncate"],
    )
)
def test_any_body_of_a_training(api: Api, content: bytes) -> None:
    send(api, "/v1/train", content)
    for one in api.run(api.client.get("/v1/classifiers")).json()[1:]:
        api.run(api.client.delete(f"/v1/classifiers/{one['classifier_id']}"))


@settings(deadline=None, max_examples=50)
@given(given=examples)
def test_any_update(api: Api, classifier_id: str, given: Any) -> None:
    send(api, "/v1/train", orjson.dumps({"classifier_id": classifier_id, "input": given}))


@settings(deadline=None, max_examples=50)
@given(asked=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40) | st.uuids().map(str))
def test_any_id_is_not_found(api: Api, asked: str) -> None:
    response = api.run(api.client.delete(f"/v1/classifiers/{quote(asked, safe='')}"))
    assert response.status_code == 404
    conforms(response)
