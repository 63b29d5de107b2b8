"""Images to RGB arrays: what a viewer shows on a white page, the first frame of an animation."""

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from fundament.core import Array, Media
from fundament.media.arrays import RGB, check_scans, refusal
from fundament.media.drawings import draw
from fundament.media.formats import SVG, expect

# Pixels are counted here, against the operator's own limit.
Image.MAX_IMAGE_PIXELS = None

# What Pillow's readers raise over a damaged file.
_DAMAGES = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
)

_STRIP_PIXELS = 1_000_000
_ORIENTATION_TAG = 0x0112
_TILE_TAGS = (0x0142, 0x0143)  # width and height
_BITS_TAG, _MEANING_TAG, _FORMAT_TAG = 0x0102, 0x0106, 0x0153  # of a TIFF's pixels
_PNG_DEPTH = 24  # where the bits of a channel are said
_SIGNED = 2  # in the tag of the format
_TOO_DEEP = "This image has more than 16 bits per channel. Send 8 or 16 bits."
_UNKNOWN_RANGE = "This image has {} pixels, whose range nothing tells. Send 8 or 16 bits, unsigned."
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def picture(media: Media) -> RGB:
    """An image as it is meant to be seen, uint8 `[height, width, 3]`.

    It is turned as its EXIF says and laid on white where it is transparent; 16 bits per channel become 8.

    Raises:
        InputError: it cannot be decoded, has too many pixels, or is no image.
    """
    form = expect(media)
    if form is SVG:
        return draw(media)
    if form.reader == "JPEG":
        check_scans(media, media.content)
    if form.reader == "HEIF":
        _register_heif(media)
    if form.reader == "WEBP":  # Pillow's reader makes room for the whole canvas before it tells its size
        _check_size(media, *_webp_size(media.content))
    try:
        with Image.open(io.BytesIO(media.content), formats=(form.reader,)) as image:
            _check_size(media, *image.size)
            if isinstance(image, TiffImageFile):  # its tiles are decoded whole, however little of them it shows
                _check_size(media, *(int(image.tag_v2.get(tag, 0)) for tag in _TILE_TAGS))
            image.load()
            upright = _upright(image)
            if isinstance(image, TiffImageFile):
                if _SIGNED in image.tag_v2.get(_FORMAT_TAG, ()):
                    raise refusal(media, _UNKNOWN_RANGE.format("signed"))
                if image.mode.startswith("I"):
                    return _of_tiff(media, image.tag_v2, np.asarray(upright))
            return _rgb(media, upright)
    except _DAMAGES as error:
        raise refusal(media, f"This {form.name} cannot be decoded: it is damaged or cut short.") from error


def _check_size(media: Media, width: int, height: int) -> None:
    if width * height > (most := media.limits.image_pixels):
        raise refusal(
            media,
            f"This image has {width} x {height} pixels, more than the {most / 1e6:g} million allowed. Send it smaller.",
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # whatever a damaged EXIF block makes of its reader, the picture is there
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _rgb(media: Media, image: Image.Image) -> RGB:
    hidden = _hidden(media, image)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        return _of_grey(media, grey if hidden is None else np.where(grey == hidden, 0xFFFF, grey))
    if image.mode == "F":
        raise refusal(media, _UNKNOWN_RANGE.format("floating-point"))
    if image.mode == "La":
        image = image.convert("LA")
    if hidden is not None:
        image.info["transparency"] = hidden
    found = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _strips(found):
        part = image.crop((0, rows.start, image.width, rows.stop))
        if part.has_transparency_data:
            white = Image.new("RGBA", part.size, "white")
            white.alpha_composite(part.convert("RGBA"))
            part = white
        found[rows] = np.asarray(part.convert("RGB"))
    return found


def _strips(picture: Array) -> Iterator[slice]:
    """Its rows, some at a time: what is made of all at once would take several times its memory."""
    height, width = picture.shape[:2]
    step = max(1, _STRIP_PIXELS // max(1, width))
    return (slice(top, min(height, top + step)) for top in range(0, height, step))


def _hidden(media: Media, image: Image.Image) -> Any:
    """The colour of a PNG that is not seen, in the numbers that Pillow gives its pixels; None where there is none.

    Of 16-bit colours Pillow keeps the upper eight bits of each pixel, and widens greys of 2 and 4 bits to eight.
    """
    hidden = image.info.get("transparency")
    if hidden is None or not media.content.startswith(b"\x89PNG"):
        return hidden
    depth = media.content[_PNG_DEPTH]
    if isinstance(hidden, tuple) and depth == 16:
        return tuple(part >> 8 for part in hidden)
    if isinstance(hidden, int) and image.mode == "L" and depth < 8:
        return hidden * 255 // (2**depth - 1)
    return hidden


def _of_tiff(media: Media, tags: Mapping[int, Any], grey: Array) -> RGB:
    """8 bits of a TIFF's 12 or 16, which Pillow gives as they lie: 12 as 0 to 4095, and zero for white as zero.

    Args:
        media: the file.
        tags: what it says of itself (TIFF 6.0, section 8).
        grey: its pixels.
    """
    [bits] = tags[_BITS_TAG]
    if bits > 16:
        raise refusal(media, _TOO_DEEP)
    white = 2**bits - 1
    return _of_grey(media, white - grey if tags.get(_MEANING_TAG) == 0 else grey, white)


def _of_grey(media: Media, grey: Array, white: int = 0xFFFF) -> RGB:
    """8 of a channel's bits, rounded; Pillow would cut everything above 255 to white."""
    if grey.min(initial=0) < 0 or grey.max(initial=0) > white:
        raise refusal(media, _TOO_DEEP)
    found = np.empty((*grey.shape, 3), np.uint8)
    for rows in _strips(found):
        found[rows] = ((grey[rows].astype(np.uint32) * 510 + white) // (2 * white))[:, :, None]
    return found


def _webp_size(content: bytes) -> tuple[int, int]:
    """Width and height by the header (RFC 9649); nothing where it is damaged, which the decoder then says."""
    chunk, body = content[12:16], content[20:30]
    if len(body) < 10:
        return 0, 0
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _register_heif(media: Media) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise refusal(
            media, "HEIC needs a package that this server lacks: pip install 'fundament[heic]'. Or send JPEG or PNG."
        ) from None
    register_heif_opener()
