"""Files as callers send them, made here: whole ones, and ones that mean harm."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(image: Image.Image | Pixels, form: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **how)
    return file.getvalue()


def plain(colour: tuple[int, int, int], width: int = 8, height: int = 8, form: str = "PNG") -> bytes:
    """An image of one colour."""
    return saved(Image.new("RGB", (width, height), colour), form)


def many_scans(n: int, side: int = 64) -> bytes:
    """A progressive JPEG of one grey: the first scan draws all of it, each of the others nothing once more."""

    def segment(mark: int, body: bytes) -> bytes:
        return bytes((0xFF, mark)) + struct.pack(">H", 2 + len(body)) + body

    one_code = bytes([1, *[0] * 15])
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"
    start = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame)
    start += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\x60")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(side * side // 512)
    return start + first + (segment(0xDA, b"\1\1\0\1\x3f\0") + b"\1") * (n - 1) + b"\xff\xd9"


def jpeg_video(*frames: bytes) -> bytes:
    """A video of JPEGs, 64 pixels wide and high."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        container.start_encoding()
        for place, frame in enumerate(frames):
            packet = av.Packet(frame)
            packet.stream, packet.time_base, packet.is_keyframe = stream, stream.time_base, True
            packet.pts = packet.dts = place
            container.mux(packet)
    return file.getvalue()


def animation(form: str, colours: Sequence[tuple[int, int, int]] = (RED, GREEN, BLUE)) -> bytes:
    first, *others = [Image.new("RGB", (8, 8), colour) for colour in colours]
    return saved(
        first, form, save_all=True, append_images=others, duration=40, **({"lossless": True} if form == "WEBP" else {})
    )


def png(width: int, height: int, data: bytes = b"", *more: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it has so many pixels, whatever it holds."""
    return _png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), data, *more)


def deep_png(pixels: np.ndarray[Any, np.dtype[np.uint16]], hidden: Sequence[int] = ()) -> bytes:
    """A PNG of 16 bits per channel, which Pillow reads and does not write; pixels are `[height, width, 1, 3 or 4]`.

    Those of the hidden colour are transparent.
    """
    height, width, n_channels = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    more = [(b"tRNS", struct.pack(f">{n_channels}H", *hidden))] if hidden else []
    return _png(struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[n_channels], 0, 0, 0), lines, *more)


def _png(header: bytes, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    written = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def webp(width: int, height: int) -> bytes:
    """The header of a WebP that says it has so many pixels."""
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int) -> bytes:
    """A GIF whose one frame says that it has so many pixels."""
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\x02\0;"


def bmp(width: int, height: int) -> bytes:
    """The header of a BMP that says it has so many pixels."""
    return b"BM" + bytes(8) + struct.pack("<IIiiHH", 54, 40, width, height, 1, 24) + bytes(24)


def tiff(width: int, height: int, data: bytes = b"", *, bits: int = 8, white: int = 1, signed: bool = False) -> bytes:
    """A TIFF of greys in one strip that says it has so many pixels, and holds `data`; `white` is 0 where zero is."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 0, 277: 1, 278: height}
    tags |= {279: width * height * bits // 8 % 2**32, 339: 2 if signed else 1}
    tags[273] = 14 + 12 * len(tags)  # where the data begins
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def stream(body: bytes, entries: bytes = b"") -> bytes:
    return b"<<" + entries + b"/Length %d>>stream\n" % len(body) + body + b"\nendstream"


def pdf(
    contents: Sequence[bytes],
    *,
    resources: bytes = b"",
    box: str = "0 0 72 36",
    trailer: bytes = b"",
    more: Sequence[bytes] = (),
) -> bytes:
    """A PDF with a page for each content stream. Objects of `more` are numbered from 3 + 2 times the pages."""
    kids = b" ".join(b"%d 0 R" % (3 + 2 * number) for number in range(len(contents)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(contents))]
    for number, content in enumerate(contents):
        page = b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents %d 0 R/Resources<<%s>>>>"
        objects += [page % (box.encode(), 4 + 2 * number, resources), stream(content)]
    return assembled([*objects, *more], trailer)


def assembled(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of these objects, numbered from one; the first is its catalogue."""
    written, offsets = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(written))
        written += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return (
        written
        + b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
        + b"trailer<</Size %d/Root 1 0 R%s>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, trailer, len(written))
    )


def painted(colour: tuple[int, int, int]) -> bytes:
    """A page's content: all of it in one colour."""
    return b"%d %d %d rg 0 0 1000 1000 re f" % tuple(value // 255 for value in colour)


def many_pages(n: int) -> bytes:
    """A PDF that shows one page over and over."""
    return assembled(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[%s]/Count %d>>" % (b"3 0 R " * n, n),
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 72 72]>>",
        ]
    )


def encrypted() -> bytes:
    locked = b"<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>" % (b"41" * 32, b"42" * 32)
    return pdf([b""], trailer=b"/Encrypt 5 0 R/ID[<00><00>]", more=[locked])


def unfolding(depth: int = 9) -> bytes:
    """A page that draws a form ten times, which draws another ten times, and so on."""
    forms = []
    for level in range(depth):
        inner = b"/Resources<</XObject<</F %d 0 R>>>>" % (6 + level) if level < depth - 1 else b""
        body = b"/F Do " * 10 if level < depth - 1 else b"0 0 72 36 re f"
        forms.append(stream(body, b"/Type/XObject/Subtype/Form/BBox[0 0 72 36]" + inner))
    return pdf([b"/F Do"], resources=b"/XObject<</F 5 0 R>>", more=forms)


def wav(samples: Sequence[float] | np.ndarray[Any, Any], rate: int = 8000, n_channels: int = 1) -> bytes:
    """32-bit floating-point samples, `[samples * channels]`."""
    data = np.asarray(samples, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, n_channels, rate, rate * 4 * n_channels, 4 * n_channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def video(
    shades: Sequence[int],
    form: str = "matroska",
    *,
    width: int = 32,
    height: int = 16,
    codec: str = "ffv1",
    rate: int = 10,
    tone: bool = False,
    tone_samples: int = 4000,
    interval: int | None = None,
) -> bytes:
    """A video whose frames are grey, one for each shade, of which every `interval`th builds on no other."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if interval:
            stream.gop_size, stream.options = interval, {"sc_threshold": "1000000000"}  # no other is encoded whole
        sound = (
            container.add_stream("pcm_s16le" if form == "matroska" else "aac", rate=8000, layout="mono")
            if tone
            else None
        )
        container.start_encoding()
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound and tone_samples:
            wave = (8000 * np.sin(np.arange(tone_samples) / 5)).astype(np.int16)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            heard.sample_rate = 8000
            container.mux(sound.encode(heard))
            container.mux(sound.encode())
    return file.getvalue()


def recut(content: bytes, form: str, *, n_lost: int = 0, n_hidden: int = 0) -> bytes:
    """A video without its first packets, or whose first frames are before its beginning; nothing is encoded anew."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(content)) as source,
        av.open(file, "w", format=form, options={"avoid_negative_ts": "disabled"}) as container,
    ):
        old = source.streams.video[0]
        new = container.add_stream_from_template(old)
        packets = [packet for packet in source.demux(old) if packet.dts is not None]
        start = packets[n_hidden].pts
        for packet in packets[n_lost:]:
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = new
            container.mux(packet)
    return file.getvalue()


def turned(picture: Pixels, degrees: int) -> bytes:
    """A video of one picture that a player turns clockwise by so much (ISO 14496-12, 8.3.2: the track's matrix)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        container.start_encoding()
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    content = file.getvalue()
    start = content.index(b"tkhd") + 44  # after version, times, number, length, layer and volume
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return content[:start] + matrix + content[start + len(matrix) :]


def still(n: int, width: int, height: int) -> bytes:
    """A video of one grey picture `n` times: little to send, much to decode."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 2
        frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), format="rgb24")
        container.start_encoding()
        first, again = (bytes(packet) for _ in range(2) for packet in stream.encode(frame))
        for place in range(n):
            packet = av.Packet(again if place else first)
            packet.stream, packet.time_base, packet.is_keyframe = stream, stream.time_base, not place
            packet.pts = packet.dts = place
            container.mux(packet)
    return file.getvalue()


def audio(form: str, codec: str, rate: int) -> bytes:
    """A second of a tone."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        wave = (8000 * np.sin(np.arange(rate) / 5)).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def many_frames(n: int) -> bytes:
    """A video of a few hundred bytes that says it has `n` frames of a byte each (ISO 14496-12, 8.6.1, 8.7.3, 8.7.4)."""
    content = bytearray(video([1, 2], "mp4", codec="mpeg4"))
    sizes, chunks, times = content.index(b"stsz") + 8, content.index(b"stsc") + 16, content.index(b"stts") + 12
    content[sizes : sizes + 8] = struct.pack(">II", 1, n)
    content[chunks : chunks + 4] = content[times : times + 4] = struct.pack(">I", n)
    return bytes(content)


def flac(n: int, rate: int) -> bytes:
    """A sound of `n` equal samples in one frame, whose length it does not tell (RFC 9639, sections 8 and 9)."""
    head = struct.pack(">HH", n, n) + bytes(6) + (rate << 44 | 15 << 36).to_bytes(8) + bytes(16)
    begin = b"\xff\xf8\x70\x08\0" + struct.pack(">H", n - 1)
    frame = begin + _crc(begin, 8, 0x07) + b"\0\x10\0"  # one value for all
    return b"fLaC\x80" + len(head).to_bytes(3) + head + frame + _crc(frame, 16, 0x8005)


def _crc(content: bytes, n_bits: int, polynomial: int) -> bytes:
    left = 0
    for byte in content:
        left ^= byte << (n_bits - 8)
        for _ in range(8):
            left = (left << 1 ^ polynomial * (left >> (n_bits - 1))) & ((1 << n_bits) - 1)
    return left.to_bytes(n_bits // 8)
