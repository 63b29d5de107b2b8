"""What becomes of the lines of a batch job: they run together, and fail alone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundament.api.jobs import outcomes
from fundament.api.jobs.lines import Line
from fundament.catalog import CATALOG
from fundament.core import Embed, Embeddings
from fundament.errors import FundamentError, RowError, TooLongError, UnavailableError
from tests.api.jobs.test_lines import read
from tests.inprocess import Api, running
from tests.served import MODEL


class Planted:
    """An engine that fails for the texts that say so."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.counts = True

    async def run(self, model: str, call: Embed, **how: Any) -> Embeddings:
        self.calls.append(len(call.texts))
        for index, text in enumerate(call.texts):
            if text == "long":
                raise TooLongError(index=index, n_tokens=9, limit=8)
            if text == "row":
                raise RowError("Input failed in the model.")
            if text == "bug":
                raise ZeroDivisionError
            if text == "busy":
                raise UnavailableError("The queue is full.")
        vectors = np.array([[len(text), 0] for text in call.texts], np.float32)
        counts = [len(text) for text in call.texts]
        return Embeddings(vectors=vectors, n_tokens=sum(counts), n_tokens_each=counts if self.counts else ())


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running(tmp_path / "data", worker=False, preload=False) as api:
        yield api


@pytest.fixture
def planted(api: Api) -> Planted:
    api.app.state.parts.engine = engine = Planted()
    return engine


def embedded(api: Api, found: list[Line]) -> list[outcomes.Outcome]:
    return api.run(outcomes.embed_lines(api.app.state.parts, found, caller=""))


def test_lines_run_together_and_come_back_apart(api: Api, planted: Planted) -> None:
    text = "\n".join(json.dumps({"input": given}) for given in ("a", ["bb", "ccc"], "dddd"))
    found = embedded(api, read(text, normalized=False))
    assert planted.calls == [4]
    written = [json.loads(line)["response"]["body"] for line in outcomes.output_lines(found)]
    assert [[item["embedding"][0] for item in body["data"]] for body in written] == [[1], [2, 3], [4]]
    assert [body["usage"]["total_tokens"] for body in written] == [1, 5, 4]
    assert [[item["index"] for item in body["data"]] for body in written] == [[0], [0, 1], [0]]


@pytest.mark.parametrize("poison", ["long", "row", "bug"])
def test_a_line_that_the_model_refuses_fails_alone(api: Api, planted: Planted, poison: str) -> None:
    texts = ["a"] * 20
    texts[13] = poison
    found = embedded(api, read("\n".join(json.dumps({"input": text}) for text in texts)))
    assert [json.loads(line)["custom_id"] for line in outcomes.output_lines(found)] == [
        str(number) for number in range(20) if number != 13
    ]
    [error] = [json.loads(line) for line in outcomes.error_lines(found)]
    assert error["custom_id"] == "13"
    assert error["response"]["status_code"] == (400 if poison == "long" else 500)
    assert error["error"]["message"] == error["response"]["body"]["error"]["message"]
    assert len(planted.calls) < 12  # halves, not line by line


def test_lines_run_alone_where_their_tokens_are_not_told_apart(api: Api, planted: Planted) -> None:
    planted.counts = False
    found = embedded(api, read('"a"\n"bb"\n"ccc"'))
    assert [len(list(outcomes.output_lines([each]))) for each in found] == [1, 1, 1]
    assert planted.calls.count(1) == 3


def test_a_field_that_is_wrong_has_the_name_that_requests_know(api: Api) -> None:
    [found] = embedded(api, read('{"input": "a", "dimensions": 9999}'))
    [error] = [json.loads(line)["response"]["body"]["error"] for line in outcomes.error_lines([found])]
    body = {"model": MODEL, "input": "a", "dimensions": 9999}
    asked = api.run(api.client.post("/v1/embeddings", json=body)).json()["error"]
    assert error == {**asked, "code": "invalid_input"}
    assert error["param"] == "dimensions"


def test_a_model_that_is_busy_is_no_fault_of_the_lines(api: Api, planted: Planted) -> None:
    with pytest.raises(UnavailableError):
        embedded(api, read('"a"\n"busy"'))


def test_lines_of_late_chunking_are_never_read_as_one(api: Api, planted: Planted) -> None:
    spec = replace(CATALOG[MODEL], late_chunking=True)
    api.app.state.parts.served = lambda: {MODEL: spec}
    found = embedded(api, read('"a"\n"bb"', late_chunking=True))
    assert planted.calls == [1, 1]
    assert all(not isinstance(each.answer, FundamentError) for each in found)


def test_real_vectors_are_those_of_the_endpoint(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        texts = ["one", "two words", "three words here"]
        found = embedded(api, read("\n".join(map(json.dumps, texts))))
        body = api.run(api.embed(texts)).json()
    written = [json.loads(line)["response"]["body"] for line in outcomes.output_lines(found)]
    np.testing.assert_allclose(
        [each["data"][0]["embedding"] for each in written], [item["embedding"] for item in body["data"]], atol=0.01
    )
    assert sum(each["usage"]["total_tokens"] for each in written) == body["usage"]["total_tokens"]
