"""Videos to frames and sounds to samples, where the `video` extra is installed."""

import io
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from fundament.core import Array, Media
from fundament.media.arrays import RGB, Samples, check_interest, check_scans, refusal
from fundament.media.formats import Format, expect

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.packet import Packet
    from av.stream import Stream
    from av.video.frame import VideoFrame

_MOST_FRAME_PIXELS = 4096 * 2304  # a decoder keeps up to sixteen frames
_MOST_TRACKS = 16  # a frame of each is decoded as the file is opened, which nobody can stop
_MOST_CPU_SECONDS = 30
_CUT_SHARE, _CUT_SECONDS = 0.05, 0.1  # by which a whole file may end before it says
_PIPED_BYTES = 0x7FFF_0000  # what a WAV of unknown length says that it has, or more
_MOST_RATE = 768_000  # what is made to convert a rate grows with it, in one step that nobody can stop


def frames(media: Media, n: int, *, most_seconds: float = _MOST_CPU_SECONDS) -> Iterator[RGB]:
    """At most `n` frames of a video, evenly spread from its first to its last, uint8 `[height, width, 3]`.

    One frame at a time is in memory. A video with fewer frames gives all of them.

    Args:
        media: the file.
        n: most frames.
        most_seconds: of processor time, what is done with the frames in between included.

    Raises:
        InputError: it cannot be decoded, has no frames, is too long or too large, or takes too much to decode.
    """
    n_frames, n_before = _look_through(media)
    wanted = np.linspace(0, n_frames - 1, min(n, n_frames)).astype(int).tolist()
    with _opened(media) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frame: VideoFrame | None = None
        n_pixels = 0
        packets = islice(_in_time(media, container.demux(stream), most_seconds), n_before, None)
        for place, frame in enumerate(chain.from_iterable(_decoded(media, packet) for packet in packets)):
            _check_frame(media, frame.width, frame.height)
            _check_pixels(media, n_pixels := n_pixels + frame.width * frame.height)
            if place == wanted[0]:
                yield _upright(frame)
                wanted.pop(0)
            if not wanted:
                return
        if frame is None:
            raise refusal(media, "This video has no frames that can be decoded.")
        yield from [_upright(frame)] * len(wanted)  # a packet may bring no frame, as some of MPEG-4's do


def sound(media: Media, rate: int, *, most_seconds: float = _MOST_CPU_SECONDS) -> Samples | None:
    """The mean of all channels, float32 `[samples]` at `rate` per second; None of a video without any.

    Args:
        media: the file.
        rate: of the result.
        most_seconds: of processor time.

    Raises:
        InputError: it cannot be decoded, has no samples, samples that are not finite, is too long, or takes too much
            to decode.
    """
    av = _library(media)
    most = int(media.limits.seconds * rate)
    found: list[Samples] = []
    n_samples, end = 0, 0.0
    with _opened(media) as container:
        if not container.streams.audio:
            if media.kind == "video":
                return None
            raise refusal(media, "This file has no sound track.")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise refusal(media, "This sound's codec is not known here.")
        _check_seconds(media, container, stream)
        # Samples of all channels side by side: of planes, PyAV counts more than there are from eight channels on.
        resampler = av.AudioResampler(format="flt", rate=rate)
        stream.codec_context.thread_count = 1

        # What Matroska says of its length, see `_check_end`, is of all its streams.
        read = container.streams if expect(media).reader == "matroska" else [stream]

        def decoded() -> Iterator["AudioFrame | None"]:
            nonlocal end
            for packet in _in_time(media, container.demux(*read), most_seconds):
                end = max(end, _end_of(packet))
                if packet.stream is stream:
                    yield from _decoded(media, packet)
            yield None  # for what the resampler still has

        for frame in decoded():
            if frame is not None and frame.sample_rate > _MOST_RATE:
                told = f"{frame.sample_rate:,} samples a second, more than the {_MOST_RATE:,} allowed"
                raise refusal(media, f"This {media.kind} has {told}.")
            for piece in resampler.resample(frame):
                found.append(piece.to_ndarray().reshape(-1, piece.layout.nb_channels).mean(axis=1))
                n_samples += len(found[-1])
            if n_samples > most:
                raise _too_long(media)
        if media.kind == "audio":
            _check_end(media, container, max(end, n_samples / rate))
    if n_samples == 0 and media.kind == "video":
        return None
    if n_samples == 0:
        raise refusal(media, "This sound has no samples that can be decoded.")
    samples = np.concatenate(found)
    if not np.isfinite(samples).all():
        raise refusal(media, "This sound has samples that are not finite numbers.")
    return samples


def _in_time(media: Media, packets: Iterable["Packet[Any]"], most_seconds: float) -> Iterator["Packet[Any]"]:
    """A file's packets, within processor time and as long as somebody waits for them.

    A header does not tell what decoding costs. Streams are decoded on the calling thread, whose time this is.
    """
    end = time.thread_time() + most_seconds
    for packet in packets:
        check_interest(media)
        if time.thread_time() >= end:
            raise refusal(media, f"This {media.kind} takes too much to decode. Send a part of it, or send it smaller.")
        yield packet


def _decoded(media: Media, packet: "Packet[Any]") -> list[Any]:
    """The frames that are whole with a packet."""
    check_scans(media, bytes(packet))  # of a video of JPEGs, each is decoded in one go
    return packet.decode()


def _end_of(packet: "Packet[Any]") -> float:
    """Where what a packet holds ends, in seconds; 0 where it does not say."""
    if packet.pts is None or not packet.time_base:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _upright(frame: "VideoFrame") -> RGB:
    picture: Array = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))


def count_frames(media: Media) -> int:
    """How many frames a video shows, by its packets: nothing is decoded.

    Raises:
        InputError: it has none, cannot be opened, or is too long or too large.
    """
    return _look_through(media)[0]


def _look_through(media: Media) -> tuple[int, int]:
    """How many frames a video shows, and how many of its packets come before the first that can be decoded alone.

    A video that was trimmed without being encoded anew has frames that are decoded and not shown, or begins with some
    that build on others it has lost.
    """
    with _opened(media) as container:
        if not container.streams.video:
            raise refusal(media, "This file has no pictures.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise refusal(media, "This video's codec is not known here.")
        _check_frame(media, stream.codec_context.width, stream.codec_context.height)
        _check_seconds(media, container, stream)
        shown: list[bool] = []
        first_key: int | None = None
        end, most = 0.0, media.limits.video_frames
        for packet in container.demux():
            end = max(end, _end_of(packet))
            if packet.size > 0 and packet.stream is stream:
                if packet.is_keyframe and first_key is None:
                    first_key = len(shown)
                shown.append(not packet.is_discard)
            if len(shown) > most:
                raise refusal(media, f"This video has more than the {most:,} frames allowed. Send a part of it.")
        _check_end(media, container, end)
    n_before = first_key or 0
    if (n_frames := sum(shown[n_before:])) == 0:
        raise refusal(media, "This video has no frames.")
    _check_pixels(media, len(shown) * stream.codec_context.width * stream.codec_context.height)
    return n_frames, n_before


def _check_frame(media: Media, width: int, height: int) -> None:
    if width * height > (most := min(_MOST_FRAME_PIXELS, media.limits.image_pixels)):
        raise refusal(
            media,
            f"This video has frames of {width} x {height} pixels, more than the {most / 1e6:.3g} million allowed. "
            "Send it smaller.",
        )


def _check_pixels(media: Media, n_pixels: int) -> None:
    if n_pixels > (most := media.limits.video_pixels):
        raise refusal(
            media,
            f"This video has {n_pixels / 1e6:,.0f} million pixels in all its frames together, more than the "
            f"{most / 1e6:,g} million allowed. Send it smaller, or a part of it.",
        )


def _check_seconds(media: Media, container: "InputContainer", stream: "Stream") -> None:
    """Refuse what says that it is too long; what says less than it holds is counted while it is read."""
    told = [container.duration / 1e6] if container.duration else []
    if stream.duration and stream.time_base:
        told.append(float(stream.duration * stream.time_base))
    if told and max(told) > media.limits.seconds:
        raise _too_long(media)


def _check_end(media: Media, container: "InputContainer", end: float) -> None:
    """Refuse a file that ends well before it says, where what it says is no estimate: one that was cut.

    Args:
        media: the file.
        container: the same, opened.
        end: where what it holds ends, in seconds.
    """
    form, content = expect(media), media.content
    told = (container.duration or 0) / 1e6 if form.reader == "matroska" else 0.0
    if form.reader == "wav" and _PIPED_BYTES > (n_bytes := int.from_bytes(content[4:8], "little")) > 0:
        told = end * (8 + n_bytes) / len(content)
    if end < (1 - _CUT_SHARE) * told - _CUT_SECONDS:
        raise refusal(media, f"This {form.name} file is cut short: it says that it has {told:.1f} seconds.")


def _too_long(media: Media) -> Exception:
    return refusal(
        media, f"This {media.kind} is longer than the {media.limits.seconds:g} seconds allowed. Send a part."
    )


@contextmanager
def _opened(media: Media) -> Iterator["InputContainer"]:
    form, av = expect(media), _library(media)
    try:
        with av.open(
            io.BytesIO(media.content),
            format=form.reader,  # by its first bytes: play lists and the like, which name other files, have no reader
            io_open=_refuse_other_files,
            options={"max_pixels": str(_MOST_FRAME_PIXELS), "max_streams": str(_MOST_TRACKS)},
            metadata_errors="ignore",
        ) as container:
            yield container
    except (av.FFmpegError, ValueError, LookupError, MemoryError, OverflowError, UnicodeError) as error:
        raise _undecodable(media, form) from error


def _undecodable(media: Media, form: Format) -> Exception:
    return refusal(media, f"This {form.name} file cannot be decoded: it is damaged or cut short.")


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    del flags, options
    raise PermissionError(f"a file of a caller's refers to {url[:100]!r}")


def _library(media: Media) -> Any:
    try:
        import av
    except ImportError:
        raise refusal(
            media, f"To read {media.kind} this server needs a package that it lacks: pip install 'fundament[video]'."
        ) from None
    return av
