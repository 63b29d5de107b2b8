"""How callers put a file into a request: base64, bare or in a data URI, or a URL."""

import binascii
import re
from urllib.parse import unquote_to_bytes

from fundament.core import MediaKind
from fundament.errors import Fault, InputError

_URL = re.compile(r"\s*(https?)://", re.IGNORECASE)
_OTHER_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]{0,20})://", re.IGNORECASE)
_DATA_URI = re.compile(r"\s*data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(;base64)?,", re.IGNORECASE)
_LETTERS = str.maketrans("-_", "+/", "\r\n\t")


def is_url(source: str) -> bool:
    """Whether it has to be fetched."""
    return _URL.match(source) is not None


def kind_of_data_uri(text: str) -> MediaKind | None:
    """What a text that is a data URI says it holds; None where it is no such text, or holds something else."""
    if (found := _DATA_URI.match(text)) is None or found[1] is None:
        return None
    kind, _, name = found[1].lower().partition("/")
    match kind:
        case "image" | "video" | "audio":
            return kind
        case "application" if name == "pdf":
            return "pdf"
    return None


def read(source: str, origin: str, max_bytes: int) -> bytes:
    """The bytes of a data URI or of base64, in either alphabet, with line breaks or without padding.

    Args:
        source: what was sent.
        origin: its place in the request.
        max_bytes: most bytes of the file.

    Raises:
        InputError: it is neither, it is empty, or it is too large.
    """
    if other := _OTHER_SCHEME.match(source):
        raise InputError(Fault(origin, f"The URL's scheme is '{other[1]}'; use http or https.", "media"))
    uri = _DATA_URI.match(source)
    payload = source[uri.end() :] if uri else source
    # Base64 in lines has a fortieth more; %xx is three characters.
    if len(payload) * 3 / 4 > max_bytes * (1.03 if uri is None or uri[2] else 4) + 1024:
        raise too_large(origin, max_bytes)
    content = unquote_to_bytes(payload) if uri and not uri[2] else _from_base64(payload)
    if not content:
        raise InputError(Fault(origin, "This is neither a URL, nor a data URI, nor base64.", "media"))
    if len(content) > max_bytes:
        raise too_large(origin, max_bytes)
    return content


def too_large(origin: str, max_bytes: int) -> InputError:
    """The error of a file that has too many bytes."""
    return InputError(Fault(origin, f"This file is larger than the {max_bytes / 1e6:g} MB allowed.", "media"))


def _from_base64(text: str) -> bytes:
    """What base64 stands for; nothing where it is not base64."""
    letters = text.strip().translate(_LETTERS).rstrip("=")
    try:
        return binascii.a2b_base64(letters + "=" * (-len(letters) % 4), strict_mode=True)
    except ValueError:  # binascii.Error, or letters beyond ASCII
        return b""
