"""Reading a multipart form whose file goes to the depot while it arrives."""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from fundament.depot import Depot
from fundament.errors import BodyError, Fault, InputError, UnavailableError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MOST_FIELD_BYTES = 64 * 1024
_MOST_PARTS = 64
_MOST_OTHER_BYTES = _MOST_PARTS * _MOST_FIELD_BYTES  # of all that is not the file


@dataclass(frozen=True, slots=True)
class Form:
    """What a form said.

    Attributes:
        fields: its texts, of those that were asked for.
        file_name: what the caller calls the file.
        n_bytes: of the file.
    """

    fields: Mapping[str, str]
    file_name: str
    n_bytes: int


async def read_form(request: Request, depot: Depot, name: str, *, fields: Collection[str], max_bytes: int) -> Form:
    """Read a form and write its part `file` to the depot; there is no file of that name where this fails.

    Args:
        request: whose body is the form.
        depot: where the file goes.
        name: of the file there.
        fields: the parts besides that are read; what else a form holds is passed over.
        max_bytes: of the file.

    Raises:
        BodyError: no multipart form (415), one that breaks off (400), or a file that is too large (413).
        InputError: no part `file`, a form that is malformed, a part given twice, or too much beside the file.
        UnavailableError: the disk is full, or the bucket does not answer.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BodyError(415, "Send a form with a file: 'Content-Type: multipart/form-data; boundary=…'.")
    too_large = BodyError(413, f"The file is larger than {max_bytes / 1e6:g} MB. Divide it.")
    if int(request.headers.get("content-length") or 0) > max_bytes + _MOST_OTHER_BYTES:
        raise too_large
    parts = _Parts(fields)

    async def pieces() -> AsyncIterator[bytes]:
        """The file; a form that is not whole, or has none, is an error before its end, so that nothing is kept."""
        parser = MultipartParser(boundary, parts.callbacks())
        n_bytes = n_arrived = 0
        async for arrived in request.stream():
            parser.write(arrived)
            piece = parts.take()
            n_bytes += len(piece)
            n_arrived += len(arrived)
            if n_bytes > max_bytes:
                raise too_large
            if n_arrived - n_bytes > _MOST_OTHER_BYTES:
                raise InputError(Fault("body", "What the form holds beside its file is too long.", "too_long"))
            if piece:
                yield piece
        parser.finalize()
        if not parts.ended:
            raise BodyError(400, "The form breaks off.")
        if parts.file_name is None:
            raise InputError(Fault("body -> file", "Field required", "missing"))

    try:
        n_bytes = await depot.write(name, pieces())
    except ClientDisconnect:
        raise BodyError(400, "The connection closed before the form was whole.") from None
    except FormParserError as error:
        raise InputError(Fault("body", f"The form is malformed: {error}.", "form_invalid")) from None
    except OSError as error:
        raise UnavailableError(f"The file cannot be kept: {error.strerror}.", retry_after_seconds=60) from error
    texts = {field: value.decode(errors="replace") for field, value in parts.fields.items()}
    return Form(texts, parts.file_name or "", n_bytes)


@dataclass(slots=True)
class _Parts:
    """The parts of a form as its parser meets them.

    Attributes:
        asked: names of the fields that are kept.
        fields: the bytes of those that there are.
        file_name: what the caller calls the file; None before it is met.
        ended: whether the form is whole.
    """

    asked: Collection[str]
    fields: dict[str, bytearray] = field(default_factory=dict)
    file_name: str | None = None
    ended: bool = False
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _n_parts: int = 0
    _disposition: bytes = b""
    _name: str = ""
    _pending: list[bytes] = field(default_factory=list)

    def take(self) -> bytes:
        """What has arrived of the file since this was asked last."""
        piece = b"".join(self._pending)
        self._pending.clear()
        return piece

    def callbacks(self) -> "MultipartCallbacks":
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._name_part,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > _MOST_PARTS:
            raise InputError(Fault("body", f"The form has more than {_MOST_PARTS} parts.", "too_long"))
        self._disposition = b""

    def _end_header(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _name_part(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        if self._name in self.fields or (self._name == "file" and self.file_name is not None):
            raise self._wrong("It is there twice. Give one.")
        if self._name == "file":
            file_name = options.get(b"filename", b"file")
            self._check(file_name)
            self.file_name = file_name.decode(errors="replace")
        elif self._name in self.asked:
            self.fields[self._name] = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        piece = data[start:end]
        if self._name == "file":
            self._pending.append(piece)
        elif (value := self.fields.get(self._name)) is not None:
            self._check(piece)
            value.extend(piece)
            if len(value) > _MOST_FIELD_BYTES:
                raise self._wrong(f"It is longer than {_MOST_FIELD_BYTES:,} bytes.", "too_long")

    def _check(self, text: bytes) -> None:
        """Refuse what PostgreSQL takes in no text."""
        if b"\0" in text:
            raise self._wrong("It holds a NUL character.")

    def _wrong(self, message: str, kind: str = "value_error") -> InputError:
        return InputError(Fault(f"body -> {self._name}", message, kind))

    def _end(self) -> None:
        self.ended = True
