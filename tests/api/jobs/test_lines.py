"""The lines of a batch job: their forms, their chunks, and what fails alone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundament.api.embeddings import EmbeddingsRequest, task_of
from fundament.api.jobs import lines
from fundament.api.jobs.lines import Line
from fundament.catalog import CATALOG, ModelSpec, find
from fundament.core import Embed, Embeddings
from fundament.errors import FundamentError, InputError, RowError, TooLongError, UnavailableError
from fundament.jsonl import InputFileError, csv_lines, jsonl
from tests.inprocess import Api, running
from tests.served import MODEL

_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["body", "input", "custom_id", "text", "url", "model"]), inner, max_size=4)
    ),
)


def spec_of(name: str) -> ModelSpec | None:
    return find(name, {MODEL: CATALOG[MODEL]})


def read(text: str | bytes, **defaults: Any) -> list[Line]:
    return lines.read(text.encode() if isinstance(text, str) else text, 0, {"model": MODEL, **defaults}, spec_of)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "input"


@pytest.mark.parametrize(
    ("text", "custom_id", "given"),
    [
        ('{"custom_id": "a", "body": {"input": "x"}}', "a", ["x"]),
        (
            '{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": ["x"]}}',
            "a",
            ["x"],
        ),
        ('{"custom_id": 7, "input": "x"}', "7", ["x"]),
        ('{"custom_id": "a", "text": "x"}', "a", ["x"]),
        ('{"id": 3, "text": "x"}', "0", ["x"]),
        ('"x"', "0", ["x"]),
        ('\ufeff{"input": "x"}', "0", ["x"]),
        ('{"input": "x"}\r', "0", ["x"]),
    ],
)
def test_forms_of_a_line(text: str, custom_id: str, given: list[str]) -> None:
    [line] = read(text)
    assert isinstance(line.request, EmbeddingsRequest)
    assert (line.custom_id, line.request.input, line.request.model) == (custom_id, given, MODEL)


def test_a_line_says_more_than_its_job_does() -> None:
    text = '{"body": {"input": "x", "dimensions": 8}}\n{"input": "y"}\n\n{"input": "z", "late_chunking": true}'
    one, two, three = read(text, dimensions=16, embedding_type=["binary"])
    assert isinstance(one.request, EmbeddingsRequest)
    assert isinstance(two.request, EmbeddingsRequest)
    assert (one.request.dimensions, two.request.dimensions) == (8, 16)
    assert one.request.embedding_type == ["binary"]
    assert [line.number for line in (one, two, three)] == [0, 1, 2]
    assert one.options != two.options
    assert three.options is None


@pytest.mark.parametrize("name", ["dimensions", "embedding_type", "encoding_format"])
def test_a_line_that_says_null_says_nothing(name: str) -> None:
    [line] = read(json.dumps({"input": "x", name: None}), dimensions=16, embedding_type=["binary"])
    assert isinstance(line.request, EmbeddingsRequest)
    assert (line.request.dimensions, line.request.embedding_type) == (16, ["binary"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "should be an object"),
        ("12", "should be an object"),
        ("{}", "exactly one of text"),
        ('{"body": 5}', "should be an object"),
        ('{"body": {}}', "input: Field required"),
        ('{"body": {"input": []}}', "at least 1 item"),
        ('{"body": {"input": [[1, 2]]}}', "Token ids"),
        ('{"body": {"input": "x", "dimensions": "many"}}', "dimensions"),
        ('{"body": {"input": "x", "model": "other"}}', f"This job runs '{MODEL}'"),
        ('{"method": "GET", "body": {"input": "x"}}', "should be 'POST'"),
        ('{"url": "/v1/chat/completions", "body": {"input": "x"}}', "should be '/v1/embeddings'"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_poisoned_line_says_why(text: str | bytes, said: str) -> None:
    [line] = read(text)
    assert isinstance(line.request, InputError)
    assert said in line.request.detail
    assert line.options is None


def test_a_poisoned_line_keeps_its_name() -> None:
    [line] = read('{"custom_id": "mine", "body": {"input": []}}')
    assert line.custom_id == "mine"


def test_chunks_cover_every_line_once(path: Path) -> None:
    given = [json.dumps({"input": "x" * (4 * number)}) for number in range(1000)]
    given.insert(500, "")
    given.insert(0, "")
    path.write_text("\n".join(given))
    spans = lines.divide(path, max_lines=1000)
    assert len(spans) > 4
    raw = path.read_bytes()
    parts = [(raw[span.start : span.start + span.n_bytes], span.first_line) for span in spans]
    found = [line for part, first in parts for line in lines.read(part, first, {"model": MODEL}, spec_of)]
    assert [line.number for line in found] == list(range(1000))
    assert [len(line.request.input[0]) for line in found] == [4 * number for number in range(1000)]  # type: ignore[union-attr, arg-type]
    assert all(span.n_lines <= 256 for span in spans)
    with pytest.raises(InputFileError, match="more than 999 lines"):
        lines.divide(path, max_lines=999)


def test_a_line_that_is_too_long_is_a_chunk_of_its_own_and_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(lines, "_CHUNK_BYTES", 50)
    path.write_bytes(b'"a"\n\n"' + b"b" * 250 + b'"\n' + b" " * 300 + b'\n"c"\n')
    one, long, empty, last = lines.divide(path, max_lines=4)
    raw = path.read_bytes()
    assert [lines.too_long(span) is None for span in (one, long, empty, last)] == [True, False, False, True]
    line = lines.too_long(long)
    assert line is not None
    assert isinstance(line.request, InputError)
    assert (line.number, line.custom_id, "longer than" in line.request.detail) == (1, "1", True)
    [found] = lines.read(raw[last.start : last.start + last.n_bytes], last.first_line, {"model": MODEL}, spec_of)
    assert (found.number, found.request.input) == (3, ["c"])  # type: ignore[union-attr]


def test_a_chunk_line_by_line(path: Path) -> None:
    path.write_bytes(b'\n"a"\n\n"bb"\r\n"c"')
    [span] = lines.divide(path, max_lines=4)
    raw = path.read_bytes()
    each = lines.one_by_one(raw[span.start : span.start + span.n_bytes], span)
    assert [raw[one.start : one.start + one.n_bytes].strip() for one in each] == [b'"a"', b'"bb"', b'"c"']
    assert [(one.first_line, one.n_lines) for one in each] == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_an_input_without_lines_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputFileError, match="no lines"):
        lines.divide(path, max_lines=10)


def test_the_first_line_names_the_model(path: Path) -> None:
    path.write_text('\n{"body": {"model": "m", "input": "x"}}\n')
    assert lines.model_of(path) == "m"
    for text in ("", "[", '{"body": {"input": "x"}}', '{"body": {"model": 5}}', '"x"'):
        path.write_text(text)
        with pytest.raises(InputFileError, match="names no model"):
            lines.model_of(path)


def test_a_row_without_its_text_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "csv").write_text("id,text\n1\n2,two\n")
    one, two = read(b"".join(jsonl(csv_lines(tmp_path / "csv"))))
    assert isinstance(one.request, FundamentError)
    assert one.custom_id == "1"
    assert isinstance(two.request, EmbeddingsRequest)


@pytest.mark.parametrize("model", ["sentence-transformers/all-MiniLM-L6-v2", "All-MiniLM-L6-v2", None])
def test_a_line_may_name_the_jobs_model_as_any_caller_may(model: str | None) -> None:
    [line] = read(json.dumps({"body": {"input": "x", "model": model}}))
    assert isinstance(line.request, EmbeddingsRequest)
    assert line.request.model == (model or MODEL)


@pytest.mark.parametrize("model", ["acme/all-minilm-l6-v2", "bge-m3"])
def test_a_line_that_names_another_model_fails_alone(model: str) -> None:
    [line] = read(json.dumps({"body": {"input": "x", "model": model}}))
    assert isinstance(line.request, InputError)
    assert MODEL in line.request.detail


def test_retrieval_alone_is_the_documents_side_in_a_line_too() -> None:
    v4 = CATALOG["jina-embeddings-v4"]
    raw = b"\n".join(
        b'{"input": "x", "model": "jina-embeddings-v4", "task": "retrieval"%b}' % more
        for more in (b"", b', "prompt_name": "query"')
    )
    found = lines.read(raw, 0, {"model": v4.id}, lambda _: v4)
    tasks = [task_of(v4, line.request) for line in found if isinstance(line.request, EmbeddingsRequest)]
    assert tasks == ["retrieval.passage", "retrieval.query"]


def test_a_line_with_a_deeply_nested_field_is_read_and_stands_alone() -> None:
    nested = b'{"a":' * 300 + b"1" + b"}" * 300
    deep, plain = read(b'{"input": "x", "meta": %b}\n{"input": "y"}' % nested)
    assert isinstance(deep.request, EmbeddingsRequest)
    assert isinstance(plain.request, EmbeddingsRequest)
    assert deep.options is None
    assert plain.options is not None


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


def embedded(api: Api, found: list[Line]) -> list[lines.Outcome]:
    return api.run(lines.embed_lines(api.app.state.parts, found, caller=""))


def test_lines_run_together_and_come_back_apart(api: Api, planted: Planted, path: Path) -> None:
    text = "\n".join(json.dumps({"input": given}) for given in ("a", ["bb", "ccc"], "dddd"))
    found = embedded(api, read(text, normalized=False))
    assert planted.calls == [4]
    written = [json.loads(line)["response"]["body"] for line in lines.output_lines(found)]
    assert [[item["embedding"][0] for item in body["data"]] for body in written] == [[1], [2, 3], [4]]
    assert [body["usage"]["total_tokens"] for body in written] == [1, 5, 4]
    assert [[item["index"] for item in body["data"]] for body in written] == [[0], [0, 1], [0]]


@pytest.mark.parametrize("poison", ["long", "row", "bug"])
def test_a_line_that_the_model_refuses_fails_alone(api: Api, planted: Planted, path: Path, poison: str) -> None:
    texts = ["a"] * 20
    texts[13] = poison
    found = embedded(api, read("\n".join(json.dumps({"input": text}) for text in texts)))
    assert [json.loads(line)["custom_id"] for line in lines.output_lines(found)] == [
        str(number) for number in range(20) if number != 13
    ]
    [error] = [json.loads(line) for line in lines.error_lines(found)]
    assert error["custom_id"] == "13"
    assert error["response"]["status_code"] == (400 if poison == "long" else 500)
    assert error["error"]["message"] == error["response"]["body"]["error"]["message"]
    assert len(planted.calls) < 12  # halves, not line by line


def test_lines_run_alone_where_their_tokens_are_not_told_apart(api: Api, planted: Planted, path: Path) -> None:
    planted.counts = False
    found = embedded(api, read('"a"\n"bb"\n"ccc"'))
    assert [len(list(lines.output_lines([each]))) for each in found] == [1, 1, 1]
    assert planted.calls.count(1) == 3


def test_a_model_of_a_long_name_is_not_repeated() -> None:
    with pytest.raises(InputFileError, match="more than 256 characters") as caught:
        lines.model_named(json.dumps({"body": {"model": "x" * 257, "input": "a"}}).encode())
    assert len(caught.value.detail) < 100


def test_a_field_that_is_wrong_has_the_name_that_requests_know(api: Api) -> None:
    [found] = embedded(api, read('{"input": "a", "dimensions": 9999}'))
    [error] = [json.loads(line)["response"]["body"]["error"] for line in lines.error_lines([found])]
    body = {"model": MODEL, "input": "a", "dimensions": 9999}
    asked = api.run(api.client.post("/v1/embeddings", json=body)).json()["error"]
    assert error == {**asked, "code": "invalid_input"}
    assert error["param"] == "dimensions"


def test_a_model_that_is_busy_is_no_fault_of_the_lines(api: Api, planted: Planted, path: Path) -> None:
    with pytest.raises(UnavailableError):
        embedded(api, read('"a"\n"busy"'))


def test_lines_of_late_chunking_are_never_read_as_one(api: Api, planted: Planted, path: Path) -> None:
    spec = replace(CATALOG[MODEL], late_chunking=True)
    api.app.state.parts.served = lambda: {MODEL: spec}
    found = embedded(api, read('"a"\n"bb"', late_chunking=True))
    assert planted.calls == [1, 1]
    assert all(not isinstance(each.answer, FundamentError) for each in found)


def test_real_vectors_are_those_of_the_endpoint(tmp_path: Path, path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        texts = ["one", "two words", "three words here"]
        found = embedded(api, read("\n".join(map(json.dumps, texts))))
        body = api.run(api.embed(texts)).json()
    written = [json.loads(line)["response"]["body"] for line in lines.output_lines(found)]
    np.testing.assert_allclose(
        [each["data"][0]["embedding"] for each in written], [item["embedding"] for item in body["data"]], atol=0.01
    )
    assert sum(each["usage"]["total_tokens"] for each in written) == body["usage"]["total_tokens"]


@given(
    st.lists(
        st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), _JSON.map(json.dumps).map(str.encode))
    )
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_lines(path: Path, given_lines: list[bytes]) -> None:
    path.write_bytes(b"\n".join(given_lines))
    expected = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    try:
        spans = lines.divide(path, max_lines=1000)
    except InputFileError:
        assert expected == []
        return
    raw = path.read_bytes()
    parts = [(raw[span.start : span.start + span.n_bytes], span.first_line) for span in spans]
    found = [line for part, first in parts for line in lines.read(part, first, {"model": MODEL}, spec_of)]
    assert [line.number for line in found] == list(range(len(expected)))
    refused = [lines.Outcome(line, line.request) for line in found if isinstance(line.request, FundamentError)]
    assert len([json.loads(line) for line in lines.error_lines(refused)]) == len(refused)
