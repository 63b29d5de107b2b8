"""The `input` field in all its forms: a string, a document object, a group of parts, or a list of these."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field, PlainValidator

from fundament.api.body import echo
from fundament.core import MediaKind
from fundament.errors import Fault, InputError

_KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
_KIND_OF: dict[str, MediaKind] = {kind: kind for kind in _KINDS}
_KIND_OF |= {"url": "image", "bytes": "image"}  # {"url": …} and {"bytes": …} were images before {"image": …} was
PART_KEYS = ("text", *_KIND_OF)

_FILE = "A URL, a data URI or base64."


@dataclass(frozen=True, slots=True)
class Reference:
    """Media as a caller names it.

    Attributes:
        kind: what it is said to be.
        source: a URL, a data URI or base64.
        origin: its place in the request.
    """

    kind: MediaKind
    source: str = field(repr=False)
    origin: str


class TextDoc(BaseModel):
    """A text."""

    text: str


class ImageDoc(BaseModel):
    """An image."""

    image: str = Field(description=_FILE)


class VideoDoc(BaseModel):
    """A video."""

    video: str = Field(description=_FILE)


class AudioDoc(BaseModel):
    """A sound."""

    audio: str = Field(description=_FILE)


class PDFDoc(BaseModel):
    """A PDF: the whole input, of which each page becomes a vector."""

    pdf: str = Field(description=_FILE)


class MergedContentGroup(BaseModel):
    """Parts that become one vector, in their order."""

    content: list[TextDoc | ImageDoc | VideoDoc | AudioDoc] = Field(min_length=1)


Part = str | Reference
Sent = Part | tuple[Part, ...]
"""An input as it was sent; a tuple is a group, whose parts become one vector."""


class Alone(list[Sent]):
    """The only input, sent as it is and not in a list."""


def read_inputs(value: Any) -> list[Sent]:
    """Every input of a request, in its order; `Alone` where it is no list.

    Raises:
        InputError: something that is no input, named by its place.
    """
    if not isinstance(value, list):
        return Alone([_read(value, "body -> input")])
    check_some(value)
    return [item if isinstance(item, str) else _read(item, f"body -> input -> {i}") for i, item in enumerate(value)]


def check_some(inputs: Sequence[object], field: str = "body -> input") -> None:
    """Refuse an empty list.

    Raises:
        InputError: it is empty.
    """
    if not inputs:
        raise InputError(Fault(field, "List should have at least 1 item, not 0.", "too_short", "a list of 0"))


def check_number(inputs: Sequence[object], most: int, field: str = "body -> input") -> None:
    """Refuse a list of inputs that is too long.

    Raises:
        InputError: with the limit.
    """
    if len(inputs) > most:
        message = f"List should have at most {most} items, not {len(inputs)}. Send several requests."
        raise InputError(Fault(field, message, "too_long", f"a list of {len(inputs)}"))


def _read(value: Any, origin: str) -> Sent:
    if isinstance(value, str):
        return value
    if _is_token_ids(value):
        raise InputError(
            Fault(
                origin,
                "Token ids are not accepted: every model has its own tokenizer. Send the text itself. "
                "LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False.",
                "string_type",
                echo(value),
            )
        )
    if not isinstance(value, dict):
        raise InputError(
            Fault(origin, 'Input should be a string or an object like {"text": "…"}.', "string_type", echo(value))
        )
    if isinstance(parts := value.get("content"), list):
        return _read_group(parts, f"{origin} -> content")
    return read_part(value, origin)


def _read_group(parts: list[Any], origin: str) -> tuple[Part, ...]:
    check_some(parts, origin)
    read = tuple(read_part(part, f"{origin} -> {i}") for i, part in enumerate(parts))
    for part in read:
        if isinstance(part, Reference) and part.kind == "pdf":
            message = "A PDF becomes one vector per page, so it cannot be part of a group. Send it alone."
            raise InputError(Fault(part.origin, message))
    return read


def read_part(value: Any, origin: str) -> Part:
    """A document object: a text, or media.

    Args:
        value: what was sent.
        origin: its place in the request.

    Raises:
        InputError: something else.
    """
    if not isinstance(value, dict):
        raise InputError(Fault(origin, 'A part should be an object like {"text": "…"}.', "dict_type", echo(value)))
    named = [key for key in PART_KEYS if value.get(key) is not None]
    if len(named) != 1:
        keys = ", ".join(("text", *_KINDS))
        raise InputError(Fault(origin, f"Give exactly one of {keys}.", "value_error", echo(value)))
    key, content = named[0], value[named[0]]
    if not isinstance(content, str):
        raise InputError(Fault(f"{origin} -> {key}", "Input should be a string.", "string_type", echo(content)))
    if key == "text":
        return content
    return Reference(_KIND_OF[key], content, f"{origin} -> {key}")


def _is_token_ids(value: Any) -> bool:
    tokens = value if isinstance(value, list) and value else [value]
    return all(isinstance(token, int) and not isinstance(token, bool) for token in tokens)


_Item = str | TextDoc | ImageDoc | VideoDoc | AudioDoc | MergedContentGroup
Inputs = Annotated[
    list[Sent],
    PlainValidator(
        read_inputs,
        json_schema_input_type=str
        | TextDoc
        | ImageDoc
        | VideoDoc
        | AudioDoc
        | PDFDoc
        | Annotated[list[_Item], Field(min_length=1)],
    ),
    Field(
        description="What to embed: a string, a document object, or a list of these; media and groups of parts on "
        "models that read them."
    ),
]
