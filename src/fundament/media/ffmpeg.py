"""A program: a video or a sound on standard input, its frames or its samples on standard output.

It writes lines of JSON. Of each frame `{"n", "width", "height", "stride", "turns"}`, and then `height * stride` bytes:
rows of RGB, three bytes a pixel, filled up to the stride; `n` is how many frames come, `turns` how many quarters it is
to be turned against the clock. Of samples `{"channels", "samples"}`, and then float32, all channels of a moment side
by side. The last line is `{"end": true}`, or `{"refusal": why}`.
"""

import io
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NoReturn

import av

_MOST_TRACKS = 16  # a frame of each is decoded as the file is opened
_CUT_SHARE, _CUT_SECONDS = 0.05, 0.1  # by which a whole file may end before it says
_PIPED_BYTES = 0x7FFF_0000  # what a WAV of unknown length says that it has, or more
_MOST_RATE = 768_000  # what is made to convert a rate grows with it
_LONG_SECONDS = 1.0  # by which frames may be longer than what is counted at last


class RefusedError(Exception):
    """A file that is not taken, with the sentence for its sender."""


@dataclass(frozen=True, slots=True)
class File:
    """The file and what it may be.

    Attributes:
        content: its bytes.
        kind: what its sender says it is: `video` or `audio`.
        name: of its format, for people.
        reader: what FFmpeg calls that.
        most_seconds: of processor time.
        seconds: how long it may play.
        n_frames: most frames of a video.
        frame_pixels: most pixels of a frame.
        pixels: of all frames together.
        scan: how a scan of a JPEG begins, in Latin-1.
        n_scans: most scans of a JPEG among its frames.
    """

    content: bytes
    kind: str
    name: str
    reader: str
    most_seconds: float
    seconds: float
    n_frames: int
    frame_pixels: int
    pixels: int
    scan: str
    n_scans: int

    def too_long(self) -> RefusedError:
        """What plays too long."""
        return RefusedError(f"This {self.kind} is longer than the {self.seconds:g} seconds allowed. Send a part.")


def frames(file: File, n: int) -> None:
    """Write at most `n` frames of a video, evenly spread from its first to its last; all of one with fewer."""
    n_shown, n_before = _look_through(file)
    n = min(n, n_shown)
    wanted = spread(n, n_shown)
    with _opened(file) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frame, n_pixels = None, 0
        packets = islice(_in_time(file, container.demux(stream)), n_before, None)
        for place, frame in enumerate(chain.from_iterable(_decoded(file, packet) for packet in packets)):
            _check_frame(file, frame.width, frame.height)
            _check_pixels(file, n_pixels := n_pixels + frame.width * frame.height)
            if place == wanted[0]:
                _write_frame(frame, n)
                wanted.pop(0)
            if not wanted:
                return
        if frame is None:
            raise RefusedError("This video has no frames that can be decoded.")
        for _ in wanted:  # a packet may bring no frame, as some of MPEG-4's do
            _write_frame(frame, n)


def spread(n: int, of: int) -> list[int]:
    """`n` places evenly spread from the first to the last, rounded down, to the last bit as NumPy's `linspace` is."""
    step = (of - 1) / max(1, n - 1)
    return [*(int(place * step) for place in range(n - 1)), of - 1] if n > 1 else [0]


def _write_frame(frame: Any, n: int) -> None:
    turns, frame = frame.rotation // 90, frame.reformat(format="rgb24")
    [plane] = frame.planes
    _say(n=n, width=frame.width, height=frame.height, stride=plane.line_size, turns=turns)
    sys.stdout.buffer.write(memoryview(plane)[: frame.height * plane.line_size])


def sound(file: File, rate: int) -> None:
    """Write the samples at `rate` per second; none of a video without any."""
    most, n_samples, n_seconds, end = int(file.seconds * rate), 0, 0.0, 0.0
    with _opened(file) as container:
        if not container.streams.audio:
            if file.kind == "video":
                return
            raise RefusedError("This file has no sound track.")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise RefusedError("This sound's codec is not known here.")
        _check_seconds(file, container, stream)
        # Samples of all channels side by side: of planes, PyAV counts more than there are from eight channels on.
        resampler = av.AudioResampler(format="flt", rate=rate)
        stream.codec_context.thread_count = 1

        # What Matroska says of its length, see `_check_end`, is of all its streams.
        read = container.streams if file.reader == "matroska" else [stream]

        def decoded() -> Iterator[Any]:
            nonlocal end
            for packet in _in_time(file, container.demux(*read)):
                end = max(end, _end_of(packet))
                if packet.stream is stream:
                    yield from packet.decode()
            yield None  # for what the resampler still has

        for frame in decoded():
            if frame is not None:
                if frame.sample_rate > _MOST_RATE:
                    told = f"{frame.sample_rate:,} samples a second, more than the {_MOST_RATE:,} allowed"
                    raise RefusedError(f"This {file.kind} has {told}.")
                # Before it is converted: of few samples a second each becomes many.
                n_seconds += frame.samples / max(1, frame.sample_rate)
                if n_seconds > file.seconds + _LONG_SECONDS:
                    raise file.too_long()
            for piece in resampler.resample(frame):
                n_channels, n_here = piece.layout.nb_channels, piece.samples
                if (n_samples := n_samples + n_here) > most:
                    raise file.too_long()
                _say(channels=n_channels, samples=n_here)
                sys.stdout.buffer.write(memoryview(piece.planes[0])[: 4 * n_channels * n_here])
        if file.kind == "audio":
            _check_end(file, container, max(end, n_samples / rate))
    if n_samples == 0 and file.kind == "audio":
        raise RefusedError("This sound has no samples that can be decoded.")


def _in_time(file: File, packets: Iterable[Any]) -> Iterator[Any]:
    """A file's packets, within processor time: a header does not tell what decoding costs."""
    for packet in packets:
        if time.process_time() >= file.most_seconds:
            raise RefusedError(f"This {file.kind} takes too much to decode. Send a part of it, or send it smaller.")
        yield packet


def _decoded(file: File, packet: Any) -> list[Any]:
    """The frames that are whole with a packet."""
    if (n_scans := sum(1 for _ in re.finditer(file.scan.encode("latin-1"), bytes(packet)))) > file.n_scans:
        told = f"holds a JPEG of {n_scans:,} scans, more than the {file.n_scans} allowed. Save it anew."
        raise RefusedError(f"This {file.kind} {told}")  # it is decoded in one go
    found: list[Any] = packet.decode()
    return found


def _end_of(packet: Any) -> float:
    """Where what a packet holds ends, in seconds; 0 where it does not say."""
    if packet.pts is None or not packet.time_base:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _look_through(file: File) -> tuple[int, int]:
    """How many frames a video shows, and how many of its packets come before the first that can be decoded alone.

    A video that was trimmed without being encoded anew has frames that are decoded and not shown, or begins with some
    that build on others it has lost.
    """
    with _opened(file) as container:
        if not container.streams.video:
            raise RefusedError("This file has no pictures.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise RefusedError("This video's codec is not known here.")
        width, height = stream.codec_context.width, stream.codec_context.height
        _check_frame(file, width, height)
        _check_seconds(file, container, stream)
        shown: list[bool] = []
        first_key: int | None = None
        end = 0.0
        for packet in _in_time(file, container.demux()):
            end = max(end, _end_of(packet))
            if packet.size > 0 and packet.stream is stream:
                if packet.is_keyframe and first_key is None:
                    first_key = len(shown)
                shown.append(not packet.is_discard)
            if len(shown) > file.n_frames:
                raise RefusedError(f"This video has more than the {file.n_frames:,} frames allowed. Send a part of it.")
        _check_end(file, container, end)
    n_before = first_key or 0
    if (n_frames := sum(shown[n_before:])) == 0:
        raise RefusedError("This video has no frames.")
    _check_pixels(file, len(shown) * width * height)
    return n_frames, n_before


def _check_frame(file: File, width: int, height: int) -> None:
    if width * height > file.frame_pixels:
        raise RefusedError(
            f"This video has frames of {width} x {height} pixels, more than the {file.frame_pixels / 1e6:.3g} million "
            "allowed. Send it smaller."
        )


def _check_pixels(file: File, n_pixels: int) -> None:
    if n_pixels > file.pixels:
        raise RefusedError(
            f"This video has {n_pixels / 1e6:,.0f} million pixels in all its frames together, more than the "
            f"{file.pixels / 1e6:,g} million allowed. Send it smaller, or a part of it."
        )


def _check_seconds(file: File, container: Any, stream: Any) -> None:
    """Refuse what says that it is too long; what says less than it holds is counted while it is read."""
    told = [container.duration / 1e6] if container.duration else []
    if stream.duration and stream.time_base:
        told.append(float(stream.duration * stream.time_base))
    if told and max(told) > file.seconds:
        raise file.too_long()


def _check_end(file: File, container: Any, end: float) -> None:
    """Refuse a file that ends well before it says, where what it says is no estimate: one that was cut.

    Args:
        file: which.
        container: the same, opened.
        end: where what it holds ends, in seconds.
    """
    told = (container.duration or 0) / 1e6 if file.reader == "matroska" else 0.0
    if file.reader == "wav" and _PIPED_BYTES > (n_bytes := int.from_bytes(file.content[4:8], "little")) > 0:
        told = end * (8 + n_bytes) / len(file.content)
    if end < (1 - _CUT_SHARE) * told - _CUT_SECONDS:
        raise RefusedError(f"This {file.name} file is cut short: it says that it has {told:.1f} seconds.")


@contextmanager
def _opened(file: File) -> Iterator[Any]:
    try:
        with av.open(
            io.BytesIO(file.content),
            format=file.reader,  # by its first bytes: play lists and the like, which name other files, have no reader
            io_open=_refuse_other_files,
            options={"max_pixels": str(file.frame_pixels), "max_streams": str(_MOST_TRACKS)},
            metadata_errors="ignore",
        ) as container:
            yield container
    except (av.FFmpegError, ValueError, LookupError, MemoryError, OverflowError, UnicodeError) as error:
        raise RefusedError(f"This {file.name} file cannot be decoded: it is damaged or cut short.") from error


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    del flags, options
    raise PermissionError(f"a file of a caller's refers to {url[:100]!r}")


def _say(**what: object) -> None:
    sys.stdout.buffer.write(json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        {"frames": frames, "sound": sound}[asked["what"]](File(sys.stdin.buffer.read(), **asked["file"]), asked["n"])
        _say(end=True)
    except RefusedError as refused:
        _say(refusal=str(refused))
    sys.stdout.buffer.flush()
