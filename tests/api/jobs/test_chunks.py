"""The chunks of a batch job's input: every line is in one."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundament.api.jobs import chunks, lines, outcomes
from fundament.errors import FundamentError, InputError
from fundament.jsonl import InputFileError
from tests.api.jobs.test_lines import spec_of
from tests.served import MODEL

_JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["body", "input", "custom_id", "text", "url", "model"]), inner, max_size=4)
    ),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "input"


def test_chunks_cover_every_line_once(path: Path) -> None:
    given = [json.dumps({"input": "x" * (4 * number)}) for number in range(1000)]
    given.insert(500, "")
    given.insert(0, "")
    path.write_text("\n".join(given))
    spans = chunks.divide(path, max_lines=1000)
    assert len(spans) > 4
    raw = path.read_bytes()
    parts = [(raw[span.start : span.start + span.n_bytes], span.first_line) for span in spans]
    found = [line for part, first in parts for line in lines.read(part, first, {"model": MODEL}, spec_of)]
    assert [line.number for line in found] == list(range(1000))
    assert [len(line.request.input[0]) for line in found] == [4 * number for number in range(1000)]  # type: ignore[union-attr, arg-type]
    assert all(span.n_lines <= 256 for span in spans)
    with pytest.raises(InputFileError, match="more than 999 lines"):
        chunks.divide(path, max_lines=999)


def test_a_line_that_is_too_long_is_a_chunk_of_its_own_and_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 100)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 50)
    path.write_bytes(b'"a"\n\n"' + b"b" * 250 + b'"\n' + b" " * 300 + b'\n"c"\n')
    one, long, empty, last = chunks.divide(path, max_lines=4)
    raw = path.read_bytes()
    assert [lines.too_long(span) is None for span in (one, long, empty, last)] == [True, False, False, True]
    line = lines.too_long(long)
    assert line is not None
    assert isinstance(line.request, InputError)
    assert (line.number, line.custom_id, "longer than" in line.request.detail) == (1, None, True)
    [found] = lines.read(raw[last.start : last.start + last.n_bytes], last.first_line, {"model": MODEL}, spec_of)
    assert (found.number, found.request.input) == (3, ["c"])  # type: ignore[union-attr]


def test_a_chunk_line_by_line(path: Path) -> None:
    path.write_bytes(b'\n"a"\n\n"bb"\r\n"c"')
    [span] = chunks.divide(path, max_lines=4)
    raw = path.read_bytes()
    each = chunks.one_by_one(raw[span.start : span.start + span.n_bytes], span)
    assert [raw[one.start : one.start + one.n_bytes].strip() for one in each] == [b'"a"', b'"bb"', b'"c"']
    assert [(one.first_line, one.n_lines) for one in each] == [(0, 1), (1, 1), (2, 1)]


@pytest.mark.parametrize("text", ["", "\n\n \n"])
def test_an_input_without_lines_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputFileError, match="no lines"):
        chunks.divide(path, max_lines=10)


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
        spans = chunks.divide(path, max_lines=1000)
    except InputFileError:
        assert expected == []
        return
    raw = path.read_bytes()
    parts = [(raw[span.start : span.start + span.n_bytes], span.first_line) for span in spans]
    found = [line for part, first in parts for line in lines.read(part, first, {"model": MODEL}, spec_of)]
    assert [line.number for line in found] == list(range(len(expected)))
    refused = [outcomes.Outcome(line, line.request) for line in found if isinstance(line.request, FundamentError)]
    assert len([json.loads(line) for line in outcomes.error_lines(refused)]) == len(refused)
