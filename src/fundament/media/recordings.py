"""Videos to frames and sounds to samples, where the `video` extra is installed.

A few hundred bytes can ask a decoder for gigabytes, or for minutes: each file is decoded by a process of its own.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from fundament.core import Media
from fundament.errors import InputError
from fundament.media.arrays import MOST_SCANS, RGB, SCAN, Samples, check_interest, refusal
from fundament.media.bounded import bounded, feed
from fundament.media.formats import expect

_PROGRAM = str(Path(__file__).with_name("ffmpeg.py"))
_MOST_FRAME_PIXELS = 4096 * 2304  # a decoder keeps up to sixteen frames
_MOST_CPU_SECONDS = 30


def frames(media: Media, n: int, *, most_seconds: int = _MOST_CPU_SECONDS) -> Iterator[tuple[RGB, int]]:
    """At most `n` frames of a video, evenly spread from its first to its last, uint8 `[height, width, 3]`.

    Each comes with how many there are; one at a time is in memory. A video with fewer frames gives all of them.

    Args:
        media: the file.
        n: most frames.
        most_seconds: of processor time.

    Raises:
        InputError: it cannot be decoded, has no frames, is too long or too large, or takes too much to decode.
    """
    with _decoding(media, "frames", n, most_seconds) as pipe:
        for told in _told(media, pipe):
            height, width, stride = told["height"], told["width"], told["stride"]
            rows = np.frombuffer(_read(media, pipe, height * stride), np.uint8).reshape(height, stride)
            upright = np.rot90(rows[:, : 3 * width].reshape(height, width, 3), told["turns"])
            yield np.ascontiguousarray(upright), told["n"]


def sound(media: Media, rate: int, *, most_seconds: int = _MOST_CPU_SECONDS) -> Samples | None:
    """The mean of all channels, float32 `[samples]` at `rate` per second; None of a video without any.

    Args:
        media: the file.
        rate: of the result.
        most_seconds: of processor time.

    Raises:
        InputError: it cannot be decoded, has no samples, samples that are not finite, is too long, or takes too much
            to decode.
    """
    found: list[Samples] = []
    with _decoding(media, "sound", rate, most_seconds) as pipe:
        for told in _told(media, pipe):
            n_channels, n_samples = told["channels"], told["samples"]
            piece = np.frombuffer(_read(media, pipe, 4 * n_channels * n_samples), np.float32)
            found.append(piece.reshape(n_samples, n_channels).mean(axis=1))
    if not found:
        return None
    samples = np.concatenate(found)
    if not np.isfinite(samples).all():
        raise refusal(media, "This sound has samples that are not finite numbers.")
    return samples


@contextmanager
def _decoding(media: Media, what: str, n: int, most_seconds: int) -> Iterator[IO[bytes]]:
    """What the program writes, which has read the file."""
    form, limits = expect(media), media.limits
    if importlib.util.find_spec("av") is None:
        raise refusal(
            media, f"To read {media.kind} this server needs a package that it lacks: pip install 'fundament[video]'."
        )
    file = {
        "kind": media.kind,
        "name": form.name,
        "reader": form.reader,
        "most_seconds": most_seconds,
        "seconds": limits.seconds,
        "n_frames": limits.video_frames,
        "frame_pixels": min(_MOST_FRAME_PIXELS, limits.image_pixels),
        "pixels": limits.video_pixels,
        "scan": SCAN.decode("latin-1"),
        "n_scans": MOST_SCANS,
    }
    asked = json.dumps({"what": what, "n": n, "file": file})
    # It looks at the time itself between any two packets, and is ended where one of them takes longer.
    with bounded(_PROGRAM, asked, seconds=most_seconds + 1, interest=media.interest) as process:
        assert process.stdout is not None
        feed(process, media.content)
        yield process.stdout


def _told(media: Media, pipe: IO[bytes]) -> Iterator[dict[str, Any]]:
    """What the program says, line by line, to its end.

    Raises:
        InputError: it refuses the file, or was ended over it.
    """
    while True:
        check_interest(media)
        try:
            told: dict[str, Any] = json.loads(pipe.readline())
        except ValueError:  # nothing, or half a line: the process was ended
            raise _ended(media) from None
        if "refusal" in told:
            raise refusal(media, told["refusal"])
        if "end" in told:
            return
        yield told


def _read(media: Media, pipe: IO[bytes], n_bytes: int) -> bytes:
    content = pipe.read(n_bytes)
    if len(content) < n_bytes:
        raise _ended(media)
    return content


def _ended(media: Media) -> InputError:
    check_interest(media)
    return refusal(media, f"This {media.kind} cannot be decoded: it is damaged, or takes too much to decode.")
