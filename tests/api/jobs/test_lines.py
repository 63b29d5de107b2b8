"""The lines of a batch job: their forms, and what is said of those that cannot be read."""

import json
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from fundament.api.embeddings import EmbeddingsRequest, task_of
from fundament.api.jobs import lines
from fundament.api.jobs.lines import Line
from fundament.catalog import CATALOG, ModelSpec, find
from fundament.errors import FundamentError, InputError
from fundament.jsonl import InputFileError, csv_lines, jsonl
from fundament.worker.inputs import bounded
from tests.served import MODEL


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
        ('{"custom_id": 7.0, "input": "x"}', "7", ["x"]),
        ('{"custom_id": null, "input": "x"}', "0", ["x"]),
        ('{"custom_id": "", "input": "x"}', "", ["x"]),
        ('{"id": 3, "text": "x"}', "3", ["x"]),
        ('{"id": "b", "custom_id": "a", "input": "x"}', "a", ["x"]),
        ('{"id": "b", "body": {"input": "x"}}', "0", ["x"]),
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
        ('{"custom_id": 1.5, "input": "x"}', "custom_id: It should be a string"),
        ('{"custom_id": true, "input": "x"}', "custom_id: It should be a string"),
        ('{"custom_id": 123456789012345678901234, "input": "x"}', "custom_id: It should be a string"),
        ('{"id": ["a"], "text": "x"}', "id: It should be a string"),
        ('{"url": "/v1/chat/completions", "body": {"input": "x"}}', "should be '/v1/embeddings'"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_poisoned_line_says_why(text: str | bytes, said: str) -> None:
    [line] = read(text)
    assert isinstance(line.request, InputError)
    assert said in line.request.detail
    assert line.options is None


def test_a_poisoned_line_keeps_its_name_where_it_can_be_read() -> None:
    [line] = read('{"custom_id": "mine", "body": {"input": []}}')
    assert line.custom_id == "mine"
    _, broken, unnamed, nobody = read('"x"\n\n{"custom_id": "2",\n{"custom_id": 1.5, "input": "x"}\n{"input": []}')
    assert [line.custom_id for line in (broken, unnamed, nobody)] == [None, None, "3"]
    assert isinstance(broken.request, InputError)
    assert broken.request.detail.endswith("at character 19. It is line 2 of those that are not empty.")
    [foreign] = read(b'"caf\xe9"')
    assert isinstance(foreign.request, InputError)
    assert foreign.request.detail.endswith("JSON: it is not UTF-8. It is line 1 of those that are not empty.")


def test_options_stand_beside_a_text_too() -> None:
    text = '{"text": "x", "dimensions": 8, "encoding_format": "base64", "page": 1}\n{"text": "y", "page": 2}'
    one, two = read(text, dimensions=16)
    assert isinstance(one.request, EmbeddingsRequest)
    assert isinstance(two.request, EmbeddingsRequest)
    assert (one.request.input, one.request.dimensions, one.request.embedding_type) == (["x"], 8, ["base64"])
    assert (two.request.input, two.request.dimensions) == (["y"], 16)
    [wrong] = read('{"text": "x", "model": "nope"}')
    assert isinstance(wrong.request, InputError)
    assert "This job runs" in wrong.request.detail


def test_what_is_no_option_keeps_no_lines_apart() -> None:
    for form in ('{{"text": "x", "page": {}}}', '{{"body": {{"input": "x", "page": {}}}}}'):
        one, two = read("\n".join(map(form.format, (1, 2))))
        assert one.options == two.options is not None


def test_the_first_line_names_the_model(path: Path) -> None:
    path.write_text('\n{"body": {"model": "m", "input": "x"}}\n')
    assert lines.model_of(path) == "m"
    for text in ("", "[", '{"body": {"input": "x"}}', '{"body": {"model": 5}}', '"x"'):
        path.write_text(text)
        with pytest.raises(InputFileError, match="names no model"):
            lines.model_of(path)


def test_a_model_of_a_long_name_is_not_repeated() -> None:
    with pytest.raises(InputFileError, match="more than 256 characters") as caught:
        lines.model_named(json.dumps({"body": {"model": "x" * 257, "input": "a"}}).encode())
    assert len(caught.value.detail) < 100


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


def test_a_line_with_a_deeply_nested_field_is_read() -> None:
    nested = b'{"a":' * 300 + b"1" + b"}" * 300
    deep, plain = read(b'{"input": "x", "meta": %b}\n{"input": "y"}' % nested)
    assert isinstance(deep.request, EmbeddingsRequest)
    assert isinstance(plain.request, EmbeddingsRequest)
    assert deep.options == plain.options is not None


def test_lines_are_counted_as_they_are_made() -> None:
    for most, most_bytes, said in ((9, 1_000, "more than 9 lines"), (1_000, 9, "more than 9e-06 MB")):
        with pytest.raises(InputFileError, match=said):
            list(bounded(repeat(b"x\n"), most, most_bytes))
    assert list(bounded([b"x\n"] * 9, 9, 18)) == [b"x\n"] * 9
