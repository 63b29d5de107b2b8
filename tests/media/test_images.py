"""Images of every format and mode, as a viewer shows them."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fundament.core import Media, MediaLimits
from fundament.errors import InputError
from fundament.media import images, pictures
from tests.media.files import (
    BLUE,
    GREEN,
    RED,
    WHITE,
    Pixels,
    _png,
    animation,
    deep_png,
    noise,
    plain,
    png,
    saved,
    tiff,
    webp,
)


def decoded(content: bytes, limits: MediaLimits | None = None) -> Pixels:
    [picture] = pictures(Media("image", content, "body -> input -> 3 -> image", limits or MediaLimits()))
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    return picture


def refused(content: bytes, limits: MediaLimits | None = None) -> str:
    with pytest.raises(InputError) as refusal:
        decoded(content, limits)
    assert refusal.value.faults[0].field == "body -> input -> 3 -> image"
    return refusal.value.faults[0].message


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG", "AVIF", "HEIF"])
def test_every_format_is_read(form: str) -> None:
    if form == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    found = decoded(saved(Image.new("RGB", (12, 7), RED), form, **({"lossless": True} if form == "WEBP" else {})))
    assert found.shape == (7, 12, 3)
    assert np.abs(found.astype(int) - RED).max() <= (0 if form in ("PNG", "WEBP", "BMP", "TIFF", "GIF") else 8)


def test_a_lossless_image_is_what_it_was() -> None:
    image = noise(13, 29)
    for form in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decoded(saved(image, form)), image)


@pytest.mark.parametrize(
    "method",
    [None, *(Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2))],
)
def test_a_picture_is_turned_as_its_exif_says(method: Image.Transpose | None) -> None:
    upright = noise(5, 9)
    # The orientation that undoes what the camera did, by its number in the standard.
    orientation, undo = {
        None: (1, None),
        Image.Transpose.FLIP_LEFT_RIGHT: (2, Image.Transpose.FLIP_LEFT_RIGHT),
        Image.Transpose.ROTATE_180: (3, Image.Transpose.ROTATE_180),
        Image.Transpose.FLIP_TOP_BOTTOM: (4, Image.Transpose.FLIP_TOP_BOTTOM),
        Image.Transpose.TRANSPOSE: (5, Image.Transpose.TRANSPOSE),
        Image.Transpose.ROTATE_90: (6, Image.Transpose.ROTATE_270),
        Image.Transpose.TRANSVERSE: (7, Image.Transpose.TRANSVERSE),
        Image.Transpose.ROTATE_270: (8, Image.Transpose.ROTATE_90),
    }[method]
    image = Image.fromarray(upright)
    taken = image if method is None else image.transpose(method)
    assert undo is None or taken.transpose(undo) == image
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(saved(taken, "PNG", exif=exif.tobytes())), upright)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"],
)
def test_a_damaged_exif_block_leaves_the_picture_as_it_lies(exif: bytes) -> None:
    image = noise(4, 6)
    np.testing.assert_array_equal(decoded(saved(image, "PNG", exif=exif)), image)


def test_what_is_transparent_is_white() -> None:
    rgba = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (*RED, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((1, 0), 1)
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (76, 255))
    for content in (saved(rgba), saved(rgba, "WEBP", lossless=True), saved(palette, transparency=0)):
        assert decoded(content).tolist() == [[[*WHITE], [*RED]]]
    assert decoded(saved(grey)).tolist() == [[[*WHITE], [76, 76, 76]]]


def test_half_transparent_is_half_white() -> None:
    found = decoded(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert abs(int(found[0, 0, 0]) - 127) <= 1


def test_sixteen_bits_become_eight() -> None:
    levels = np.array([[0, 128, 129, 257, 0x8000, 0xFFFE, 0xFFFF]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        assert decoded(saved(Image.fromarray(levels), form))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]


@pytest.mark.parametrize(
    ("bits", "data", "white"),
    [
        (8, b"\0\x80\xff", 1),
        (8, b"\0\x80\xff", 0),
        (12, b"\x00\x08\x00\xff\xf0", 1),
        (16, struct.pack("<3H", 0, 0x8000, 0xFFFF), 1),
        (16, struct.pack("<3H", 0, 0x8000, 0xFFFF), 0),
    ],
)
def test_greys_of_8_12_and_16_bits_in_a_tiff_and_zero_for_white(bits: int, data: bytes, white: int) -> None:
    found = decoded(tiff(3, 1, data, bits=bits, white=white))[0]
    assert found.tolist() == [[shade] * 3 for shade in ((0, 128, 255) if white else (255, 127, 0))]


def test_sixteen_bits_of_colours_become_eight() -> None:
    levels = np.array([[[0, 0x8000, 0xFFFF], [200 * 257, 50 * 257, 257]]], dtype=np.uint16)
    assert decoded(deep_png(levels)).tolist() == [[[0, 128, 255], [200, 50, 1]]]
    alpha = np.array([[[0xFFFF], [0]]], dtype=np.uint16)
    assert decoded(deep_png(np.concatenate([levels, alpha], axis=2))).tolist() == [[[0, 128, 255], [*WHITE]]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_grey_that_is_not_seen_is_white(depth: int) -> None:
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    line = b"\0" + (bytes([0, 1]) if depth == 8 else bytes([1 << (8 - 2 * depth)]))  # black and the next grey
    hidden = _png(header, line, (b"tRNS", struct.pack(">H", 0)))
    assert decoded(hidden)[0, 0].tolist() == [*WHITE]
    assert decoded(hidden)[0, 1].tolist() == [255 // (2**depth - 1)] * 3
    next_one = decoded(_png(header, line, (b"tRNS", struct.pack(">H", 1))))
    assert next_one[0].tolist() == [[0, 0, 0], [*WHITE]]


@pytest.mark.parametrize("n_channels", [1, 3])
def test_a_colour_of_16_bits_that_is_not_seen_is_white(n_channels: int) -> None:
    pixels = np.full((1, 2, n_channels), 0x1234, np.uint16)
    pixels[0, 1] = 0x8080
    found = decoded(deep_png(pixels, hidden=[0x1234] * n_channels))
    assert found[0, 0].tolist() == [*WHITE]
    assert found[0, 1].tolist() == [128] * 3
    assert decoded(deep_png(pixels))[0, 0].tolist() == [18] * 3


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 0, 0), (255, 0, 255)),
        ((0, 0, 255, 0), (255, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 128), (127, 127, 127)),
        ((100, 50, 20, 30), (137, 181, 207)),  # each channel is (255 - ink) * (255 - black) / 255
    ],
)
def test_inks_become_the_colours_that_they_print(
    form: str, ink: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> None:
    assert np.abs(decoded(saved(Image.new("CMYK", (16, 16), ink), form))[8, 8].astype(int) - colour).max() <= 1


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255), ("CMYK", (0, 0, 0, 0)), ("P", 0)])
def test_other_modes_become_rgb(mode: str, colour: int) -> None:
    image = Image.new(mode, (3, 2), colour)
    if mode == "P":
        image.putpalette([255, 255, 255])
    assert decoded(saved(image, "TIFF")).tolist() == [[[*WHITE]] * 3] * 2


def test_pixels_without_a_known_range_are_refused() -> None:
    assert "floating-point" in refused(saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    assert "signed" in refused(saved(Image.fromarray(np.full((2, 2), 255, np.int32)), "TIFF"))
    for value in (255, 70_000):
        assert "more than 16 bits" in refused(tiff(1, 1, struct.pack("<I", value), bits=32))
    for bits in (8, 16):
        assert "signed" in refused(tiff(1, 1, b"\xff\x7f", bits=bits, signed=True))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(form: str) -> None:
    assert np.unique(decoded(animation(form, (GREEN, RED, BLUE))).reshape(-1, 3), axis=0).tolist() == [[*GREEN]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "RGB", "1"])
def test_strips_are_the_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    picture = Image.fromarray(numbers, "RGBA")
    if mode == "I;16":
        picture = Image.fromarray(numbers.view(np.uint32)[..., 0].astype(np.uint16))
    elif mode == "P":
        picture = picture.quantize(16)
    else:
        picture = picture.convert(mode)
    content = saved(picture)
    whole = decoded(content)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 15)
    np.testing.assert_array_equal(decoded(content), whole)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    limits = MediaLimits(image_pixels=64)
    assert decoded(plain(RED, 8, 8), limits).shape == (8, 8, 3)
    assert refused(plain(RED, 9, 8), limits).startswith("This image has 9 x 8 pixels, more than the 6.4e-05 million")
    for content in (png(40_000, 40_000), webp(16_000, 16_000)):
        assert "more than the 64 million allowed. Send it smaller." in refused(content)


def test_the_tiles_of_a_tiff_are_counted_not_what_it_shows_of_them() -> None:
    limits = MediaLimits(image_pixels=256 * 256)
    assert decoded(tiled_tiff(256), limits).shape == (16, 16, 3)
    assert "272 x 272" in refused(tiled_tiff(272), limits)


def tiled_tiff(side: int) -> bytes:
    """A grey image of 16 x 16 in one tile (TIFF 6.0, section 15)."""
    tile = zlib.compress(bytes(side * side))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 0), (325, 0)]
    start = 8 + 2 + 12 * len(tags) + 4
    values = dict(tags) | {324: start, 325: len(tile)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + tile


def test_a_webp_of_every_kind_tells_its_size() -> None:
    limits = MediaLimits(image_pixels=63)
    for how in ({"lossless": True}, {"lossless": False}, {"lossless": True, "exif": b"Exif\0\0"}):
        content = saved(Image.new("RGB", (8, 8)), "WEBP", **how)
        assert "8 x 8" in refused(content, limits)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="20" height="10">%b</svg>'


def test_a_drawing_fills_the_side_that_it_is_given() -> None:
    pytest.importorskip("resvg_py")
    found = decoded(SVG % b'<rect width="10" height="10" fill="#f00"/>')
    assert found.shape == (512, 1024, 3)
    assert found[256, 256].tolist() == [*RED]
    assert found[256, 768].tolist() == [*WHITE]


@pytest.mark.parametrize(
    "part",
    [
        b'<image href="/etc/hostname" width="9" height="9"/>',
        b'<image xlink:href="https://example.com/x.png"/>',
        b'<image href="data:image/png;base64,AAAA"/>',
        b'<use href="other.svg#a"/>',
        b"<style>@import 'x.css';</style>",
        b'<rect style="fill:url(x.svg#a)"/>',
        b"<use href = ' other.svg#a'/>",
        b"< svg:image/>",
    ],
)
def test_a_drawing_that_refers_to_something_is_refused(part: bytes) -> None:
    pytest.importorskip("resvg_py")
    assert "refers to something outside itself" in refused(SVG % part)


@pytest.mark.parametrize(
    ("part", "n_times"),
    [
        (b" ", 900_000),
        (b"<!DOCTYPE", 100_000),
        (b"< ", 400_000),
        (b"href=", 180_000),
        (b"url( ", 180_000),
        (b"a:", 400_000),
    ],
)
def test_what_a_drawing_refers_to_is_found_in_no_time(part: bytes, n_times: int) -> None:
    pytest.importorskip("resvg_py")
    for before in (b"<a href=", b"<rect style='fill:url(", b"<"):
        refused(SVG % (before + part * n_times + b"#"))  # an hour each, where what was taken is given back


def test_an_entity_in_a_drawing_is_refused() -> None:
    pytest.importorskip("resvg_py")
    assert "refers" in refused(b'<!DOCTYPE svg [<!ENTITY a "aaaa">]>' + SVG.partition(b"?>")[2] % b"<text>&a;</text>")
    assert "cannot be drawn" in refused(SVG % b"<broken")
