"""Instructions in the caller's own words, over HTTP."""

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from fundament.catalog import CATALOG
from tests.checkpoints import llama, qwen
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

QWEN3 = "qwen3-embedding-0.6b"
TEXTS = ["the inner city", "x"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("instruction")
    directory = llama.save(folder / "qwen3", qwen.QWEN3, qwen.weights(qwen.QWEN3))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    named = [f"{QWEN3}={directory}", f"plain={directory}", MODEL]
    with running(folder / "data", dims={QWEN3: 32}, models=named, dtype="float32") as api:
        yield api


def post(api: Api, model: str = QWEN3, given: Any = TEXTS, **fields: Any) -> httpx.Response:
    answer = api.run(api.client.post("/v1/embeddings", json={"model": model, "input": given, **fields}))
    conforms(answer)
    return answer


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]])


def test_an_instruction_is_put_as_the_model_is_given_one(api: Api) -> None:
    """The same checkpoint under a name without tasks reads the same when the prompt is written out."""
    words = "Find {what} rhymes"
    found = post(api, instruction=words)
    written = [f"Instruct: {words}\nQuery:{text}" for text in TEXTS]
    np.testing.assert_allclose(vectors(found), vectors(post(api, "plain", written)), atol=1e-6)
    assert found.json()["usage"] == post(api).json()["usage"]


def test_it_takes_the_place_of_the_tasks_own(api: Api) -> None:
    alone = vectors(post(api, instruction="Find rhymes"))
    np.testing.assert_allclose(vectors(post(api, instruction="Find rhymes", task="qa.query")), alone, atol=1e-6)
    assert not np.allclose(vectors(post(api, task="qa.query")), alone, atol=1e-3)
    told = CATALOG[QWEN3].tasks["qa.query"].prompt.removeprefix("Instruct: ").removesuffix("\nQuery:")
    np.testing.assert_allclose(vectors(post(api, instruction=told)), vectors(post(api, task="qa.query")), atol=1e-6)


@pytest.mark.parametrize("nothing", [None, ""])
def test_nothing_is_no_instruction(api: Api, nothing: str | None) -> None:
    for task in ("qa.query", "retrieval.passage"):
        with_it, without = post(api, task=task, instruction=nothing), post(api, task=task)
        np.testing.assert_allclose(vectors(with_it), vectors(without), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (MODEL, {"instruction": "Find rhymes"}, f"follows no instructions. Models served here that do: {QWEN3}."),
        (QWEN3, {"instruction": "Find rhymes", "task": "retrieval.passage"}, "leave one of the two out"),
        (QWEN3, {"instruction": "a" * 2001}, "at most 2000 characters"),
        (QWEN3, {"instruction": 1}, "valid string"),
    ],
)
def test_what_does_not_go_together_is_refused(api: Api, model: str, fields: dict[str, Any], words: str) -> None:
    answer = post(api, model, **fields)
    assert answer.status_code == 422
    [fault] = answer.json()["errors"]
    assert fault["field"] == "body -> instruction"
    assert words in fault["message"]
