"""What a file is, by its first bytes: names and content types are only what senders believe."""

import re
from dataclasses import dataclass

from fundament.core import Media, MediaKind
from fundament.media.arrays import check_interest, refusal

_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Format:
    """A file format.

    Attributes:
        name: for people.
        kinds: what a file of it can be.
        reader: what the decoder calls it: Pillow or FFmpeg.
    """

    name: str
    kinds: tuple[MediaKind, ...]
    reader: str


def _image(name: str) -> Format:
    return Format(name, ("image",), name.upper())


def _audio(name: str, reader: str) -> Format:
    return Format(name, ("audio",), reader)


def _video(name: str, reader: str) -> Format:
    return Format(name, ("video", "audio"), reader)


PDF = Format("PDF", ("pdf",), "pdfium")
SVG = Format("SVG", ("image",), "resvg")
_MP4 = _video("MP4", "mp4")
_WAV, _AVI, _WEBP = _audio("WAV", "wav"), _video("AVI", "avi"), _image("WebP")
_AVIF, _HEIC = _image("AVIF"), Format("HEIC", ("image",), "HEIF")

_SIGNATURES: tuple[tuple[bytes, Format], ...] = (
    (rb"\xff\xd8\xff", _image("JPEG")),
    (rb"\x89PNG\r\n\x1a\n", _image("PNG")),
    (rb"GIF8[79]a", _image("GIF")),
    (rb"BM.{4}\0{4}", _image("BMP")),
    (rb"II\*\0|MM\0\*", _image("TIFF")),
    (rb"RIFF.{4}WEBP", _WEBP),
    (rb"(?:RIFF|RF64).{4}WAVE", _WAV),
    (rb"RIFF.{4}AVI ", _AVI),
    (rb".{4}(?:moov|mdat|wide)", _MP4),
    (rb"\x1a\x45\xdf\xa3", _video("Matroska", "matroska")),
    (rb"FLV\x01", _video("FLV", "flv")),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", _video("ASF", "asf")),
    (rb"\0\0\x01\xba", _video("MPEG", "mpeg")),
    (rb"\x47.{187}\x47", _video("MPEG-TS", "mpegts")),
    (rb"OggS", Format("Ogg", ("audio", "video"), "ogg")),
    (rb"fLaC", _audio("FLAC", "flac")),
    (rb"FORM.{4}AIF[FC]", _audio("AIFF", "aiff")),
    (rb"\xff[\xf0\xf1\xf8\xf9]", _audio("AAC", "aac")),
    (rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]", _audio("MP3", "mp3")),
    (rb"(?:\xef\xbb\xbf)?[\s\0]*%PDF-", PDF),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.*?|<!--.*?|<!DOCTYPE\s+svg.*?)?<svg[\s>]", SVG),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), form) for pattern, form in _SIGNATURES)
_BRANDS = {b"avif": _AVIF, b"avis": _AVIF} | dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"mif1"), _HEIC)

_ARTICLES = {"image": "an image", "pdf": "a PDF", "video": "a video", "audio": "a sound"}


def format_of(content: bytes) -> Format | None:
    """The format of a file; None where it is none that is known here."""
    head = content[:_HEAD_BYTES]
    if head[4:8] == b"ftyp":
        return _format_of_boxes(head)
    return next((form for pattern, form in _PATTERNS if pattern.match(head)), None)


def _format_of_boxes(head: bytes) -> Format:
    """Of a file of ISO boxes, by the brands that it says it is compatible with."""
    end = min(int.from_bytes(head[:4]), len(head))
    brands = [head[8:12], *(head[start : start + 4] for start in range(16, end, 4))]
    found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
    if found:
        return _AVIF if _AVIF in found else _HEIC
    return _audio("M4A", "mp4") if head[8:11] in (b"M4A", b"M4B") else _MP4


def expect(media: Media) -> Format:
    """The format of a file, which must be of the kind that the caller says it is.

    Raises:
        InputError: another kind, or no known format; or nobody waits for it any more.
    """
    check_interest(media)
    form = format_of(media.content)
    said = _ARTICLES[media.kind]
    if form is None:
        raise refusal(media, f"This is not {said} of a known format: its first bytes are none's.")
    if media.kind not in form.kinds:
        other = form.kinds[0]
        way_out = f'Where it is taken, send it as {{"{other}": …}}.'
        raise refusal(media, f"This is not {said}: its bytes are {form.name}. {way_out}")
    return form
