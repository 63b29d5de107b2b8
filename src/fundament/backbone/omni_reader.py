"""From a call's pictures, videos, sounds and groups of them to rows of tokens: how jina-embeddings-v5-omni reads them.

A row's features are `ids` and `adapter`; `pictures` int64 `[n, 3]` (first token, rows and columns of tokens) with the
patches of each as `pixels0`, …; and `sounds` int64 `[n, 2]` (first token, tokens) with the frames of each as `mels0`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from fundament import media
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.audio import n_audio_tokens
from fundament.backbone.towers.images import Pixels, check_form, cut, fitting_size, frame_size, resize
from fundament.backbone.towers.sounds import RATE, SECONDS, log_mel
from fundament.core import Array, Group, Item, Media, MediaKind
from fundament.errors import Fault, InputError, TooLongError

MOST_FRAMES = 32
"""Frames that are read of a video, evenly spread."""
FRAMES_PER_SECOND = 24.0
"""What times in a prompt are reckoned by, whatever the video's own rate is: so does the publisher's processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """Ids of the tokens around media and in their places.

    Attributes:
        image: one per token of a picture.
        video: one per token of a frame of a video.
        before_picture: before a picture or a frame; None where there is no such token.
        after_picture: after it.
        audio: one per token of a sound.
        before_audio: before a sound.
        after_audio: after it.
        timed: whether a frame's time goes before it.
        special: those whose embeddings are the tasks' own, in the order of `TaskParts.marks`.
    """

    image: int
    video: int
    before_picture: int | None
    after_picture: int | None
    audio: int
    before_audio: int
    after_audio: int
    timed: bool
    special: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """All of them."""
        around = (self.before_picture, self.after_picture, self.before_audio, self.after_audio)
        return [self.image, self.video, self.audio, *self.special, *(one for one in around if one is not None)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What pictures are resized to, in pixels.

    Attributes:
        patch: height and width of a patch.
        factor: height and width of a token.
        image: the least and the most of an image.
        video: the least and the most of all frames of a video together.
    """

    patch: int
    factor: int
    image: tuple[int, int]
    video: tuple[int, int]


@dataclass(slots=True)
class Row:
    """A row, or a file's part of one, that grows part by part.

    Attributes:
        n_inside: what it costs the towers, in tokens.
        is_whole: False where a text is so long that only more than fits of it was looked at.
        is_cut: whether a sound lost its end.
    """

    pieces: list[Array] = field(default_factory=list)
    pictures: list[tuple[int, int, int]] = field(default_factory=list)
    sounds: list[tuple[int, int]] = field(default_factory=list)
    features: dict[str, Array] = field(default_factory=dict)
    n_media: dict[MediaKind, int] = field(default_factory=dict)
    n_tokens: int = 0
    n_inside: int = 0
    is_whole: bool = True
    is_cut: bool = False

    def add(self, ids: Sequence[int] | Array) -> None:
        """Add tokens."""
        self.pieces.append(np.asarray(ids, dtype=np.int64))
        self.n_tokens += len(ids)

    def count(self, kind: MediaKind, n: int) -> None:
        """Count tokens that stand for media."""
        self.n_media[kind] = self.n_media.get(kind, 0) + n

    def extend(self, part: "Row") -> None:
        """Add what a part holds; the arrays are the same."""
        for number, (first, rows, columns) in enumerate(part.pictures):
            self.features[f"pixels{len(self.pictures)}"] = part.features[f"pixels{number}"]
            self.pictures.append((self.n_tokens + first, rows, columns))
        for number, (first, n) in enumerate(part.sounds):
            self.features[f"mels{len(self.sounds)}"] = part.features[f"mels{number}"]
            self.sounds.append((self.n_tokens + first, n))
        self.pieces += part.pieces
        self.n_tokens += part.n_tokens
        self.n_inside += part.n_inside
        self.is_cut |= part.is_cut
        for kind, n in part.n_media.items():
            self.count(kind, n)


class OmniReader:
    """What is not a text alone, to rows of tokens.

    Args:
        tokenizer: the checkpoint's own.
        marks: the tokens for media.
        limits: sizes of pictures.
        merge: patches of a picture's token come in squares of this many by this many.
        n_mels: bands of frequencies that are read of a sound.
    """

    def __init__(self, tokenizer: TextTokenizer, marks: Marks, limits: Limits, *, merge: int, n_mels: int) -> None:
        self.tokenizer, self.marks, self.limits = tokenizer, marks, limits
        self.merge, self.n_mels = merge, n_mels

    def rows(self, value: Media | Group, prompt: str, files: dict[Media, Row], *, truncate: bool) -> list[Row]:
        """One row, or of a PDF one per page.

        Args:
            value: what is read.
            prompt: goes before its first text.
            files: what was read of a call's files before, to which those of `value` are added.
            truncate: whether a sound may lose its end.

        Raises:
            InputError: a file that this model cannot read.
        """
        rows = []
        if isinstance(value, Media) and value.kind == "pdf":
            for page in media.pictures(value):
                rows.append(Row())
                self._picture(rows[-1], "image", [page], value.origin)
            return rows
        row = Row()
        for part in value.parts if isinstance(value, Group) else [value]:
            if isinstance(part, str):
                [(ids, is_whole)] = self.tokenizer.first_pieces([prompt + part], self.tokenizer.context)
                row.add(ids)
                row.is_whole &= is_whole
                prompt = ""  # once, before the first text
            else:
                if part not in files:
                    files[part] = self._file(part, truncate=truncate)
                row.extend(files[part])
                files[part].n_inside = 0  # the towers have read it for this row
        return [row]

    def _file(self, file: Media, *, truncate: bool) -> Row:
        row = Row()
        match file.kind:
            case "image":
                [picture] = media.pictures(file)
                self._picture(row, "image", [picture], file.origin)
            case "video":
                self._video(row, file)
            case "audio":
                self._sound(row, file, truncate=truncate)
            case "pdf":
                raise InputError(Fault(file.origin, "A PDF is several images and no part of a group. Send it alone."))
        return row

    def _picture(
        self, row: Row, kind: Literal["image", "video"], frames: Sequence[Pixels], origin: str, n_frames: int = 1
    ) -> None:
        """Add a picture of one frame, or of two of a video's."""
        check_form(frames[0], origin)
        size_of = fitting_size if kind == "image" else partial(frame_size, n_frames)
        least, most = self.limits.image if kind == "image" else self.limits.video
        height, width = size_of(*frames[0].shape[:2], factor=self.limits.factor, least=least, most=most)
        cuts = [cut(resize(frame, height, width), self.limits.patch, self.merge) for frame in frames]
        # Channel by channel, and in each the earlier frame before the later; the tower reads a lone one twice.
        frame_by_frame = np.stack([each.pixels for each in cuts], axis=1)
        n_patches = len(frame_by_frame)
        pixels = frame_by_frame.reshape(n_patches, len(cuts), 3, -1).transpose(0, 2, 1, 3).reshape(n_patches, -1)
        rows, columns = cuts[0].rows // self.merge, cuts[0].columns // self.merge
        marks = self.marks
        if marks.before_picture is not None:
            row.add([marks.before_picture])
        row.features[f"pixels{len(row.pictures)}"] = np.ascontiguousarray(pixels)
        row.pictures.append((row.n_tokens, rows, columns))
        row.add([marks.image if kind == "image" else marks.video] * (rows * columns))
        row.count(kind, rows * columns)
        row.n_inside += rows * columns * self.merge**2
        if marks.after_picture is not None:
            row.add([marks.after_picture])

    def _video(self, row: Row, file: Media) -> None:
        """Add a video: its sound, where it has one, then its frames by pairs."""
        self._sound(row, file, truncate=True)  # of a video some frames are read, and of its sound the beginning
        pair: list[Pixels] = []
        for place, (frame, n_frames) in enumerate(media.frames(file, MOST_FRAMES)):  # how many decides on their size
            pair.append(frame)
            if len(pair) == 2 or place == n_frames - 1:
                if self.marks.timed:
                    first = place - len(pair) + 1
                    seconds = (first + min(first + 1, n_frames - 1)) / 2 / FRAMES_PER_SECOND
                    row.add(self.tokenizer.pieces([f"<{seconds:.1f} seconds>"])[0])
                self._picture(row, "video", pair, file.origin, n_frames)
                pair = []

    def _sound(self, row: Row, file: Media, *, truncate: bool) -> None:
        samples = media.sound(file, RATE)
        if samples is None:
            return
        if len(samples) >= RATE * (SECONDS + 1):  # less is what encoders put around thirty seconds
            if not truncate:
                message = (
                    f"This sound takes {len(samples) / RATE:.0f} seconds, and the model reads {SECONDS}. Use "
                    "'truncate: true' to read its beginning, or divide it."
                )
                raise InputError(Fault(file.origin, message, "too_long"))
            row.is_cut = file.kind == "audio"
        frames = log_mel(samples, self.n_mels)
        n = n_audio_tokens(frames.shape[1])
        if n == 0 and file.kind == "video":
            return
        if n == 0:
            raise InputError(Fault(file.origin, "This sound is not longer than a fiftieth of a second.", "audio"))
        row.add([self.marks.before_audio])
        row.features[f"mels{len(row.sounds)}"] = frames
        row.sounds.append((row.n_tokens, n))
        row.add([self.marks.audio] * n)
        row.count("audio", n)
        row.n_inside += 2 * n
        row.add([self.marks.after_audio])

    def item(self, row: Row, adapter: int, place: int) -> Item:
        """A row whose parts are all there as an item; `place` is that of the call's input.

        Raises:
            InputError: it has no tokens.
            TooLongError: it is longer than the context.
        """
        tokenizer = self.tokenizer
        ids = tokenizer.enclose(np.concatenate(row.pieces))
        if len(ids) > tokenizer.context:
            raise TooLongError(index=place, n_tokens=len(ids), limit=tokenizer.context, more=not row.is_whole)
        if len(ids) == 0:
            raise InputError(Fault(f"body -> input -> {place}", "This input has no tokens for this model."))
        features = row.features | {"ids": ids, "adapter": np.array(adapter)}
        before = tokenizer.n_before
        if row.pictures:
            features["pictures"] = np.array([(start + before, *grid) for start, *grid in row.pictures])
        if row.sounds:
            features["sounds"] = np.array([(start + before, n) for start, n in row.sounds])
        return Item(
            features=features,
            n_tokens=len(ids) + row.n_inside,
            n_counted=len(ids),
            n_truncated=row.is_cut,
            n_media=row.n_media,
        )
