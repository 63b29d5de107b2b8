"""The lines of a batch job's input, read as requests.

A line is `{"custom_id": …, "body": {"input": …}}` as OpenAI's batches have it, or plain: `{"input": …}`,
`{"text": …}`, or a string.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson

from fundament.api.body import echo, fields_by_synonym, read_json, validated, whole
from fundament.api.embeddings import EmbeddingsRequest
from fundament.api.inputs import PART_KEYS
from fundament.catalog import ModelSpec
from fundament.errors import Fault, FundamentError, InputError
from fundament.jsonl import MOST_LINE_BYTES, InputFileError
from fundament.store.leases import Span

R = TypeVar("R", bound=EmbeddingsRequest)

ENDPOINT = "/v1/embeddings"

_MOST_NAME_CHARACTERS = 256
_OWN_KEYS = ("custom_id", "id", "method", "url")
_FIELD_OF = fields_by_synonym(EmbeddingsRequest)
_OPTIONS = {*EmbeddingsRequest.model_fields, *_FIELD_OF} - {"input"}
_INPUT_KEYS = {*PART_KEYS, "content"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a job.

    Attributes:
        number: its place among the lines that are not empty, from 0.
        custom_id: the caller's name for it; its number where it has none, and None where it cannot be read.
        request: what is asked, or why nothing can be.
        options: equal for lines that may be embedded together; None where this one is embedded alone.
    """

    number: int
    custom_id: str | None
    request: EmbeddingsRequest | FundamentError
    options: bytes | None = None


def too_long(span: Span) -> Line | None:
    """What stands for a chunk that is one line, longer than any that is read; None for every other chunk."""
    if span.n_bytes <= MOST_LINE_BYTES:
        return None
    why = f"It is longer than {MOST_LINE_BYTES / 1e6:g} MB, so its custom_id is not known either."
    return Line(span.first_line, None, InputError(Fault("line", f"{why} {_place(span.first_line)}", "too_long")))


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
    passage = f"{asked.task}.passage"
    if asked.prompt_name is not None or asked.task in (None, *spec.tasks) or passage not in spec.tasks:
        return asked
    return asked.model_copy(update={"task": passage})


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
    custom_id = None
    try:
        value = read_json(raw)
        custom_id = str(number) if (name := _name(value)) is None else name
        body = _body(value)
        own = {name: given for name, given in body.items() if name in _OPTIONS}
        said = {_FIELD_OF.get(name, name) for name, given in body.items() if given is not None}
        common = {name: value for name, value in defaults.items() if name not in said}
        request = validated(body | common, EmbeddingsRequest)
        if (spec := spec_of(request.model)) is None:
            _wrong("body -> model", f"This job runs '{defaults['model']}'.", request.model)
        request = documents_side(spec, request)
    except orjson.JSONDecodeError as error:
        why = "it is not UTF-8" if "UTF-8" in error.msg else f"{error.msg}, at character {error.colno}"
        message = f"It is not valid JSON: {why}. {_place(number)}"
        return Line(number, custom_id, InputError(Fault("line", message, "json_invalid")))
    except InputError as error:
        return Line(number, custom_id, error)
    options = None if request.late_chunking else orjson.dumps(own, option=orjson.OPT_SORT_KEYS)
    return Line(number, custom_id, request, options)


def _name(value: Any) -> str | None:
    """What a line is called; a plain one's name may stand in `id`."""
    if not isinstance(value, dict):
        return None
    field = "id" if value.get("custom_id") is None and "body" not in value else "custom_id"
    name = whole(value.get(field))
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        _wrong(field, "It should be a string or a whole number.", name)
    return None if name is None else str(name)


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
    parts = {name: given for name, given in value.items() if name in _INPUT_KEYS}
    return {"input": parts} | {name: given for name, given in value.items() if name in _OPTIONS}


def _place(number: int) -> str:
    return f"It is line {number + 1} of those that are not empty."


def _wrong(field: str, message: str, value: Any) -> NoReturn:
    raise InputError(Fault(field, message, input=echo(value)))
