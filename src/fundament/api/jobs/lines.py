"""The lines of a batch job: read from its input, embedded many at a time, written to its output and its errors.

A line is `{"custom_id": …, "body": {"input": …}}` as OpenAI's batches have it, or plain: `{"input": …}`,
`{"text": …}`, or a string.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import orjson

from fundament.api.answers import EmbeddingsAnswer, contents, divided
from fundament.api.body import echo, fields_by_synonym, read_json, validated
from fundament.api.embeddings import EmbeddingsRequest, embed
from fundament.api.errors import openai_form
from fundament.api.state import State
from fundament.api.wire import json_bytes
from fundament.catalog import ModelSpec
from fundament.core import Bill, Priority
from fundament.errors import Fault, FundamentError, InputError, LimitError, UnavailableError
from fundament.jsonl import MOST_LINE_BYTES, InputFileError
from fundament.store.leases import Span
from fundament.telemetry import say

R = TypeVar("R", bound=EmbeddingsRequest)

ENDPOINT = "/v1/embeddings"

# A chunk is what a worker takes at a time, and what is done again when it dies.
_CHUNK_LINES, _CHUNK_BYTES = 256, 256 * 1024
_MOST_NAME_CHARACTERS = 256
_OWN_KEYS = ("custom_id", "id", "method", "url")
_FIELD_OF = fields_by_synonym(EmbeddingsRequest)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a job.

    Attributes:
        number: its place among the lines that are not empty, from 0.
        custom_id: the caller's name for it; its number where it has none.
        request: what is asked, or why nothing can be.
        options: equal for lines that may be embedded together; None where this one is embedded alone.
    """

    number: int
    custom_id: str
    request: EmbeddingsRequest | FundamentError
    options: bytes | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a line: its answer, or why it has none."""

    line: Line
    answer: EmbeddingsAnswer | FundamentError

    @property
    def n_tokens(self) -> int:
        """What it costs; nothing where it failed."""
        return self.answer.made.n_tokens if isinstance(self.answer, EmbeddingsAnswer) else 0


def divide(path: Path, *, max_lines: int) -> list[Span]:
    """Find the chunks of an input.

    Raises:
        InputFileError: no lines, or too many.
    """
    spans: list[Span] = []
    start = n_bytes = first = n_lines = 0
    with path.open("rb") as file:
        for size, is_empty in _sizes(file):
            if n_lines and (n_lines == _CHUNK_LINES or n_bytes + size > _CHUNK_BYTES):
                spans.append(Span(start=start, n_bytes=n_bytes, first_line=first, n_lines=n_lines))
                start, first, n_bytes, n_lines = start + n_bytes, first + n_lines, 0, 0
            if is_empty and not n_lines:
                start += size
                continue
            n_bytes += size
            n_lines += not is_empty
            if first + n_lines > max_lines:
                raise InputFileError(f"The input has more than {max_lines:,} lines. Divide it into several jobs.")
    if n_lines:
        spans.append(Span(start=start, n_bytes=n_bytes, first_line=first, n_lines=n_lines))
    if not spans:
        raise InputFileError("The input has no lines.")
    return spans


def _sizes(file: BinaryIO) -> Iterator[tuple[int, bool]]:
    """Of each line the size in bytes and whether nothing is in it; no line is in memory whole that is too long."""
    while raw := file.readline(MOST_LINE_BYTES + 1):
        size, is_empty = len(raw), len(raw) <= MOST_LINE_BYTES and not raw.strip()
        while not raw.endswith(b"\n") and (raw := file.readline(MOST_LINE_BYTES)):
            size += len(raw)
        yield size, is_empty


def one_by_one(raw: bytes, span: Span) -> list[Span]:
    """The lines of a chunk as chunks of their own; `raw` is its part of the input."""
    spans: list[Span] = []
    start = span.start
    for line in raw.split(b"\n"):
        if line.strip():
            first = span.first_line + len(spans)
            spans.append(Span(start=start, n_bytes=len(line), first_line=first, n_lines=1))
        start += len(line) + 1
    return spans


def too_long(span: Span) -> Line | None:
    """What stands for a chunk that is one line, longer than any that is read; None for every other chunk."""
    if span.n_bytes <= MOST_LINE_BYTES:
        return None
    why = f"It is longer than {MOST_LINE_BYTES / 1e6:g} MB, so its custom_id is not known either."
    return Line(span.first_line, str(span.first_line), InputError(Fault("line", why, "too_long")))


def deadly(line: Line) -> Outcome:
    """What becomes of a line over which workers died."""
    reason = "The process that ran this line died, again and again."
    return Outcome(line, line.request if isinstance(line.request, FundamentError) else FundamentError(reason))


def model_of(path: Path) -> str:
    """The model that the first line names.

    Raises:
        InputFileError: it names none.
    """
    with path.open("rb") as file:
        raw = next((raw for raw in iter(lambda: file.readline(MOST_LINE_BYTES), b"") if raw.strip()), b"")
    return model_named(raw)


def model_named(raw: bytes) -> str:
    """The model that a line names.

    Raises:
        InputFileError: it names none.
    """
    try:
        body = read_json(raw)["body"]
        model = body["model"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        model = None
    if not isinstance(model, str) or not model:
        raise InputFileError('The input\'s first line names no model: write "body": {"model": …, "input": …}.')
    if len(model) > _MOST_NAME_CHARACTERS:
        raise InputFileError(f"The input's first line names a model of more than {_MOST_NAME_CHARACTERS} characters.")
    return model


def documents_side(spec: ModelSpec, asked: R) -> R:
    """The request with the task's whole name: in a batch `retrieval` alone is the documents' side."""
    whole = f"{asked.task}.passage"
    if asked.prompt_name is not None or asked.task in (None, *spec.tasks) or whole not in spec.tasks:
        return asked
    return asked.model_copy(update={"task": whole})


def read(
    raw: bytes, first_line: int, defaults: Mapping[str, Any], spec_of: Callable[[str], ModelSpec | None]
) -> list[Line]:
    """The lines of a chunk.

    Args:
        raw: the chunk's part of the input.
        first_line: the number of its first line.
        defaults: fields of a request that a line does not say itself, `model` among them.
        spec_of: the job's model, given a name of it, and None given another's.
    """
    lines = (line for line in raw.split(b"\n") if line.strip())
    return [_line(number, line, defaults, spec_of) for number, line in enumerate(lines, start=first_line)]


def _line(number: int, raw: bytes, defaults: Mapping[str, Any], spec_of: Callable[[str], ModelSpec | None]) -> Line:
    custom_id = str(number)
    try:
        value = read_json(raw)
        if isinstance(value, dict) and isinstance(given := value.get("custom_id"), str | int):
            custom_id = str(given)
        body = _body(value)
        own = {name: value for name, value in body.items() if name != "input"}
        said = {_FIELD_OF.get(name, name) for name, given in body.items() if given is not None}
        common = {name: value for name, value in defaults.items() if name not in said}
        request = validated(body | common, EmbeddingsRequest)
        if (spec := spec_of(request.model)) is None:
            _wrong("body -> model", f"This job runs '{defaults['model']}'.", request.model)
        request = documents_side(spec, request)
    except orjson.JSONDecodeError as error:
        return Line(number, custom_id, InputError(Fault("line", f"It is not valid JSON: {error}.", "json_invalid")))
    except InputError as error:
        return Line(number, custom_id, error)
    return Line(number, custom_id, request, None if request.late_chunking else _options(own))


def _options(own: dict[str, Any]) -> bytes | None:
    """What lines that may be embedded together have in common; None of one that is nested too deeply to be written."""
    try:
        return orjson.dumps(own, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:
        return None


def _body(value: Any) -> dict[str, Any]:
    """What a line asks, as the body of a request."""
    if isinstance(value, str):
        return {"input": value}
    if not isinstance(value, dict):
        _wrong("line", 'It should be an object like {"custom_id": "1", "body": {"input": "…"}}.', value)
    if value.get("method") not in (None, "POST"):
        _wrong("method", "It should be 'POST'.", value["method"])
    if value.get("url") not in (None, ENDPOINT) and "body" in value:
        _wrong("url", f"It should be '{ENDPOINT}'.", value["url"])
    if "body" in value:
        if not isinstance(body := value["body"], dict):
            _wrong("body", 'It should be an object like {"input": "…"}.', body)
        return body
    if "input" in value:
        return {name: given for name, given in value.items() if name not in _OWN_KEYS}
    return {"input": {name: given for name, given in value.items() if name not in ("custom_id", "id")}}


def _wrong(field: str, message: str, value: Any) -> NoReturn:
    raise InputError(Fault(field, message, input=echo(value)))


async def embed_lines(state: State, lines: Sequence[Line], *, caller: str, bill: Bill | None = None) -> list[Outcome]:
    """Embed the lines of a chunk in the background lane, in their order; a line that cannot be fails alone.

    Raises:
        UnavailableError: the model cannot answer now.
        LimitError: the caller's minute has no room for them.
    """
    found: list[Outcome] = []
    run = partial(embed, state, priority=Priority.BACKGROUND, caller=caller, bill=bill)
    for _, alike in groupby(lines, key=lambda line: line.options or line.number):
        found += await _together(run, list(alike))
    return found


async def _together(
    run: Callable[[EmbeddingsRequest], Awaitable[EmbeddingsAnswer]], lines: list[Line]
) -> list[Outcome]:
    """Lines with equal options; halves of them where one fails."""
    requests = [line.request for line in lines if isinstance(line.request, EmbeddingsRequest)]
    if len(requests) < len(lines):
        # Those that could not be read have no options and stand alone.
        return [Outcome(line, line.request) for line in lines if isinstance(line.request, FundamentError)]
    joint = requests[0]
    if len(lines) > 1:
        joint = joint.model_copy(update={"input": [value for request in requests for value in request.input]})
    try:
        answer = await run(joint)
    except (UnavailableError, LimitError):
        raise
    except FundamentError as error:
        if len(lines) == 1:
            return [Outcome(lines[0], error)]
    except Exception as error:
        say("unexpected error", level=logging.ERROR, error=error, lines=len(lines))
        if len(lines) == 1:
            return [Outcome(lines[0], FundamentError("An unexpected error occurred."))]
    else:
        if len(lines) == 1:
            return [Outcome(lines[0], answer)]
        if answer.made.n_tokens_each:
            answers = divided(answer, [len(request.input) for request in requests])
            return [Outcome(line, each) for line, each in zip(lines, answers, strict=True)]
    middle = len(lines) // 2
    return [*await _together(run, lines[:middle]), *await _together(run, lines[middle:])]


def affordable(found: Sequence[Outcome], n_tokens: int) -> list[Outcome]:
    """The longest beginning of lines that costs no more than so many tokens."""
    costs = accumulate(each.n_tokens for each in found)
    return [each for each, cost in zip(found, costs, strict=True) if cost <= n_tokens]


def output_lines(found: Iterable[Outcome]) -> Iterator[bytes]:
    """The output's lines: of every line that has an answer, in OpenAI's form."""
    for each in found:
        if isinstance(each.answer, EmbeddingsAnswer):
            yield _written(each.line, 200, contents(each.answer), None)


def error_lines(found: Iterable[Outcome]) -> Iterator[bytes]:
    """The errors' lines: of every line that has none, with the reason."""
    for each in found:
        if isinstance(error := each.answer, FundamentError):
            code = error.code or "invalid_input"
            body = {"error": openai_form(error) | {"code": code}}
            yield _written(each.line, error.status, body, {"code": code, "message": error.detail})


def _written(line: Line, status: int, body: dict[str, Any], error: dict[str, str] | None) -> bytes:
    name = f"batch_req_{line.number}"
    return (
        json_bytes(
            {
                "id": name,
                "custom_id": line.custom_id,
                "response": {"status_code": status, "request_id": name, "body": body},
                "error": error,
            }
        )
        + b"\n"
    )
