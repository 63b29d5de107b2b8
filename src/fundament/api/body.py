"""Reading a request's body: size, form, then fields, each refused in words."""

import gc
import re
import threading
from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fundament.api.state import state_of
from fundament.config import Settings
from fundament.errors import BodyError, Fault, InputError

M = TypeVar("M", bound=BaseModel)

_ECHO_CHARACTERS, _MOST_FAULTS = 100, 100
_MOST_EXACT = 2**53

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # what some programs put before a text in UTF-8
_LOW_HALF = rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_BEFORE_LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD]"
_LONE_HALF = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!" + _LOW_HALF + rb")|(?<!" + _BEFORE_LOW + rb")[c-fC-F][0-9a-fA-F]{2})"
)
"""Half of a character that takes two escapes, the other not beside it. It begins with what is found fast."""


class Body(BaseModel):
    """A request's body: fields that are not known are ignored, values of a wrong kind are refused."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        """Take null for left out where a field has several names, so that the next of them counts; and 3.0 for 3."""
        if not isinstance(value, dict):
            return value
        names = fields_by_synonym(cls)
        return {name: whole(given) for name, given in value.items() if given is not None or name not in names}


def whole(value: Any) -> Any:
    """A number without a fraction as an integer, and anything else as it is.

    JSON has one kind of number, and some languages write all of theirs with a point; larger ones are not exact.
    """
    return int(value) if isinstance(value, float) and abs(value) <= _MOST_EXACT and value.is_integer() else value


@cache
def fields_by_synonym(model: type[BaseModel]) -> Mapping[str, str]:
    """The fields that callers may call by several names, by each of these names."""
    return {
        str(synonym): name
        for name, field in model.model_fields.items()
        if isinstance(field.validation_alias, AliasChoices)
        for synonym in field.validation_alias.choices
    }


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("It should have no NUL characters.")
    return text


Kept = Annotated[str, AfterValidator(_without_nul), Field(json_schema_extra={"pattern": r"^[^\x00]*$"})]
"""A text that is kept as it is: no database keeps a NUL character."""

ModelName = Annotated[str, Field(min_length=1, max_length=256)]

Truncate = Annotated[
    bool | None,
    Field(
        description="Cut inputs longer than the context instead of refusing them. Left out, they are refused, unless "
        "the operator says otherwise."
    ),
]

_PARSING = threading.Lock()


async def read_body(request: Request, model: type[M]) -> M:
    """The request's JSON body as `model`.

    Raises:
        BodyError: not JSON by its content type (415), or too large (413).
        InputError: malformed JSON, or fields that do not fit; names each.
    """
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise BodyError(
            415, f"The body's content type is '{content_type}'. Send JSON: 'Content-Type: application/json'."
        )
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise BodyError(415, f"The body's content encoding is '{encoding}'. Send it as it is.")
    raw = await _read(request, int(state_of(request).settings.max_body_mb * 1_000_000))
    try:
        value = read_json(raw)
    except orjson.JSONDecodeError as error:
        raise InputError(Fault("body", f"The body is not valid JSON: {_why(raw, error)}.", "json_invalid")) from None
    return validated(value, model, state_of(request).settings)


def read_json(raw: bytes) -> Any:
    """A body's or a line's JSON. Half of a character that takes two, as of an emoji that was cut, reads as U+FFFD.

    Raises:
        orjson.JSONDecodeError: it is none.
    """
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
    try:
        return _parsed(raw)
    except orjson.JSONDecodeError as error:
        if "surrogate" not in str(error):
            raise
    # A backslash of the text is written as an escape of its own, so that what comes behind it is none.
    return _parsed(_LONE_HALF.sub(rb"\\ufffd", raw.replace(rb"\\", rb"\u005c")))


def _parsed(raw: bytes) -> Any:
    """JSON as values. The garbage collector rests meanwhile: of millions of lists it would walk all again and again.

    One thread at a time, or one could find it resting for another and leave it so.
    """
    with _PARSING:
        collects = gc.isenabled()
        gc.disable()
        try:
            return orjson.loads(raw)
        finally:
            if collects:
                gc.enable()


def _why(raw: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        raw.decode()
    except UnicodeDecodeError as wrong:
        return f"it is not UTF-8 at byte {wrong.start}"
    return str(error)


def validated(value: Any, model: type[M], settings: Settings | None = None) -> M:
    """A value read from JSON as `model`.

    Args:
        value: what was sent.
        model: what it should be.
        settings: what validators may ask for in their context.

    Raises:
        InputError: fields that do not fit; names each.
    """
    try:
        return model.model_validate(value, context=settings)
    except ValidationError as error:
        if not isinstance(value, dict):
            message = 'The body should be an object like {"model": "…", "input": "…"}.'
            raise InputError(Fault("body", message, "model_type", echo(value))) from None
        faults = error.errors(include_url=False, include_context=False)[:_MOST_FAULTS]
        raise InputError(*map(_fault, faults)) from None


async def _read(request: Request, limit: int) -> bytes:
    too_large = BodyError(413, f"The body is larger than {limit / 1e6:g} MB. Send fewer inputs per request.")
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    chunks, size = [], 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise BodyError(400, "The connection closed before the body was whole.")
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(chunks)


def _fault(error: Any) -> Fault:
    path = " -> ".join(["body", *(str(part) for part in error["loc"] if not str(part).endswith("]"))])
    return Fault(path, error["msg"].removeprefix("Value error, "), error["type"], echo(error.get("input")))


def echo(value: Any) -> Any:
    """What of a wrong value is sent back: itself where it is short, its kind otherwise."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return _cut(value)
        case list():
            return f"a list of {len(value)}"
        case dict() if value:
            return f"an object with the keys {_cut(', '.join(map(str, islice(value, 8))))}"
        case dict():
            return "an empty object"
        case _:
            return type(value).__name__


def _cut(text: str) -> str:
    return text if len(text) <= _ECHO_CHARACTERS else f"{text[:_ECHO_CHARACTERS]}…"
