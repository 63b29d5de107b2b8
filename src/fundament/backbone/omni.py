"""A text embedder that reads pictures and sounds among its tokens: jina-embeddings-v5-omni.

Every task has its own adapter, its own layers from the towers' states to the language model's, and its own embeddings
of the tokens that mark media. All of them belong to the row, so that rows of all tasks share a batch.

A row's features are `ids` and `adapter`; `pictures` int64 `[n, 3]` (first token, rows and columns of tokens) with the
patches of each as `pixels0`, …; and `sounds` int64 `[n, 2]` (first token, tokens) with the frames of each as `mels0`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament import media
from fundament.backbone.audio_tower import AudioTower, n_audio_tokens
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.images import Patches, Pixels, check_form, cut, fitting_size, resize
from fundament.backbone.linear import Linear
from fundament.backbone.mixed import count_all
from fundament.backbone.packed import Packed, edge_of
from fundament.backbone.positions import rotary_angles
from fundament.backbone.qwen3_vision import Qwen3Vision
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.sounds import RATE, SECONDS, Frames, log_mel
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.tower_states import TowerStates
from fundament.backbone.transformer import Transformer
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Embeddings, Group, Item, Media, MediaKind
from fundament.errors import Fault, InputError, TooLongError

T = TypeVar("T")

MOST_FRAMES = 32
"""Frames that are read of a video, evenly spread."""
FRAMES_PER_SECOND = 24.0
"""What times in a prompt are reckoned by, whatever the video's own rate is: so does the publisher's processor."""


@dataclass(frozen=True, slots=True)
class Merger:
    """From the states of a square of patches to that of one token: norm, two layers."""

    norm: tuple[Tensor, Tensor]
    inner: Linear
    outer: Linear
    width: int  # numbers of all patches of a token

    def __call__(self, states: Tensor) -> Tensor:
        """`[patches, hidden]` to `[tokens, out]`."""
        normed = F.layer_norm(states, self.norm[0].shape, *self.norm, 1e-6)
        return self.outer(self.inner(normed.view(-1, self.width), "gelu"))


@dataclass(frozen=True, slots=True)
class TaskParts:
    """What a task has of its own beside its adapter.

    Attributes:
        merger: for pictures.
        projector: for sounds.
        marks: embeddings of the tokens that mark media, `[marks, hidden]`.
    """

    merger: Merger
    projector: Linear
    marks: Tensor


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
class _Row:
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
        self.pieces.append(np.asarray(ids, dtype=np.int64))
        self.n_tokens += len(ids)

    def count(self, kind: MediaKind, n: int) -> None:
        self.n_media[kind] = self.n_media.get(kind, 0) + n

    def extend(self, part: "_Row") -> None:
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


class OmniEmbedder:
    """Texts, images, videos, sounds, and groups of them, to dense vectors: the state of a row's last token.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the language model.
        vision: the tower for pictures.
        audio: the tower for sounds.
        n_mels: bands of frequencies that it reads.
        parts: of each task, in the order of the transformer's adapters.
        marks: the tokens for media.
        limits: sizes of pictures.
        spec: what each task means.
        adapters: the place of each adapter that the spec's tasks name.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        transformer: Transformer,
        vision: Qwen3Vision,
        audio: AudioTower,
        n_mels: int,
        parts: Sequence[TaskParts],
        marks: Marks,
        limits: Limits,
        spec: ModelSpec,
        adapters: Mapping[str, int],
    ) -> None:
        self.text = TextEmbedder(tokenizer, transformer, "last", spec, adapters)
        self.vision, self.audio, self.n_mels = vision, audio, n_mels
        self.parts, self.marks, self.limits, self.spec = list(parts), marks, limits, spec
        self.mark_rows = torch.stack([part.marks for part in parts])
        self.mark_numbers = np.full(len(transformer.tokens), -1)
        self.mark_numbers[list(marks.special)] = np.arange(len(marks.special))
        self.seen: TowerStates[tuple[int, int]] = TowerStates()
        self.n_bytes = self.text.n_bytes + vision.n_bytes + audio.n_bytes + self.mark_rows.nbytes
        self.n_bytes += self.seen.capacity_bytes
        for part in parts:
            self.n_bytes += part.projector.n_bytes + part.merger.inner.n_bytes + part.merger.outer.n_bytes
            self.n_bytes += sum(tensor.nbytes for tensor in part.merger.norm)

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text, file and group, and one per page of a PDF. A file that is there twice is read once.

        Raises:
            InputError: an input that this model cannot read.
            TooLongError: an input longer than the context: a text without `truncate`, or another in any case.
        """
        call = replace(call, task=call.task or self.spec.default_task)
        texts = {place: value for place, value in enumerate(call.inputs) if isinstance(value, str)}
        rows = {
            place: [row]
            for place, row in zip(texts, count_all(self.text.rows(call, texts)) if texts else [], strict=True)
        }
        read_before: dict[Media | tuple[str | Media, ...], list[Item]] = {}
        files: dict[Media, _Row] = {}
        for place, value in enumerate(call.inputs):
            if isinstance(value, str):
                continue
            key = tuple(value.parts) if isinstance(value, Group) else value
            if key not in read_before:
                read_before[key] = [self._item(call, row, place) for row in self._rows(call, value, files)]
            rows[place] = read_before[key]
        return [row for place in range(len(call.inputs)) for row in rows[place]]

    def _rows(self, call: Embed, value: Media | Group, files: dict[Media, _Row]) -> list[_Row]:
        rows = []
        if isinstance(value, Media) and value.kind == "pdf":
            for page in media.pictures(value):
                rows.append(_Row())
                self._picture(rows[-1], "image", [page], value.origin)
            return rows
        row, prompt = _Row(), self.text.prompt_of(call)
        for part in value.parts if isinstance(value, Group) else [value]:
            if isinstance(part, str):
                [(ids, is_whole)] = self.text.tokenizer.first_pieces([prompt + part], self.spec.context)
                row.add(ids)
                row.is_whole &= is_whole
                prompt = ""  # once, before the first text
            else:
                if part not in files:
                    files[part] = self._file(part, truncate=call.truncate)
                row.extend(files[part])
                files[part].n_inside = 0  # the towers have read it for this row
        return [row]

    def _file(self, file: Media, *, truncate: bool) -> _Row:
        row = _Row()
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
        self, row: _Row, kind: Literal["image", "video"], frames: Sequence[Pixels], origin: str, n_frames: int = 1
    ) -> None:
        """Add a picture of one frame or two; a video's has a share of its pixels, an image's all of them."""
        check_form(frames[0], origin)
        least, most = self.limits.image if kind == "image" else self.limits.video
        height, width = fitting_size(
            *frames[0].shape[:2],
            factor=self.limits.factor,
            least=-(-least // n_frames),
            most=most // n_frames,
        )
        cuts = [cut(resize(frame, height, width), self.limits.patch, self.vision.merge) for frame in frames]
        both = np.stack([cuts[0].pixels, cuts[-1].pixels], axis=1)
        # Channel by channel, and in each the earlier frame before the later one.
        pixels = both.reshape(len(both), 2, 3, -1).transpose(0, 2, 1, 3).reshape(len(both), -1)
        rows, columns = cuts[0].rows // self.vision.merge, cuts[0].columns // self.vision.merge
        marks = self.marks
        if marks.before_picture is not None:
            row.add([marks.before_picture])
        row.features[f"pixels{len(row.pictures)}"] = np.ascontiguousarray(pixels)
        row.pictures.append((row.n_tokens, rows, columns))
        row.add([marks.image if kind == "image" else marks.video] * (rows * columns))
        row.count(kind, rows * columns)
        row.n_inside += rows * columns * self.vision.merge**2
        if marks.after_picture is not None:
            row.add([marks.after_picture])

    def _video(self, row: _Row, file: Media) -> None:
        """Add a video: its sound, where it has one, then its frames by pairs."""
        self._sound(row, file, truncate=True)  # of a video some frames are read, and of its sound the beginning
        n_frames = min(MOST_FRAMES, media.count_frames(file))  # how many there are decides on their size
        n_even = n_frames + n_frames % 2
        pair: list[Pixels] = []
        for place, frame in enumerate(media.frames(file, MOST_FRAMES)):
            pair.append(frame)
            if len(pair) == 2 or place == n_frames - 1:
                if self.marks.timed:
                    first = place - len(pair) + 1
                    seconds = (first + min(first + 1, n_frames - 1)) / 2 / FRAMES_PER_SECOND
                    row.add(self.text.tokenizer.pieces([f"<{seconds:.1f} seconds>"])[0])
                self._picture(row, "video", pair, file.origin, n_even)
                pair = []

    def _sound(self, row: _Row, file: Media, *, truncate: bool) -> None:
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
            raise InputError(Fault(file.origin, "This sound is shorter than a fortieth of a second.", "audio"))
        row.add([self.marks.before_audio])
        row.features[f"mels{len(row.sounds)}"] = frames
        row.sounds.append((row.n_tokens, n))
        row.add([self.marks.audio] * n)
        row.count("audio", n)
        row.n_inside += 2 * n
        row.add([self.marks.after_audio])

    def _item(self, call: Embed, row: _Row, place: int) -> Item:
        tokenizer = self.text.tokenizer
        ids = tokenizer.enclose(np.concatenate(row.pieces))
        if len(ids) > self.spec.context:
            raise TooLongError(index=place, n_tokens=len(ids), limit=self.spec.context, more=not row.is_whole)
        if len(ids) == 0:
            raise InputError(Fault(f"body -> input -> {place}", "This input has no tokens for this model."))
        features = row.features | {"ids": ids, "adapter": np.array(self.text.adapter_of(call.task))}
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

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """One float32 vector `[dim]` per row."""
        transformer = self.text.transformer
        packed, order = pack_items(items, transformer.device)
        rows = [items[place].features for place in order]
        with torch.inference_mode():
            x = transformer.embed(packed)
            self._put_marks(x, packed, rows)
            self._put_pictures(x, packed, rows)
            self._put_sounds(x, packed, rows)
            shape = transformer.shape
            rotation = rotary_angles(packed.positions, shape.head_dim, shape.rope_theta, x.dtype)
            states = transformer.run(x, [packed] * shape.n_layers, rotation, edge_of(packed, "last"))
            vectors = states.float().cpu().numpy()
        return unsort(vectors, order)

    def _put_marks(self, x: Tensor, packed: Packed, rows: Sequence[dict[str, Array]]) -> None:
        """Give the tokens that mark media the embeddings of their row's task."""
        numbers = self.mark_numbers[np.concatenate([row["ids"] for row in rows])]
        tasks = np.repeat([int(row["adapter"]) for row in rows], np.diff(packed.bounds))
        [where] = np.nonzero(numbers >= 0)
        found = torch.from_numpy(np.stack((where, tasks[where], numbers[where]))).to(x.device)
        x[found[0]] = self.mark_rows[found[1], found[2]]

    def _put_pictures(self, x: Tensor, packed: Packed, rows: Sequence[dict[str, Array]]) -> None:
        merge = self.vision.merge

        def patches(pixels: Array, spot: list[int]) -> Patches:
            return Patches(pixels, spot[1] * merge, spot[2] * merge)

        self._put(x, packed, rows, "pictures", "pixels", patches, self.vision, lambda task: self.parts[task].merger)

    def _put_sounds(self, x: Tensor, packed: Packed, rows: Sequence[dict[str, Array]]) -> None:
        def frames(mels: Array, _: list[int]) -> Frames:
            return mels

        self._put(x, packed, rows, "sounds", "mels", frames, self.audio, lambda task: self.parts[task].projector)

    def _put(
        self,
        x: Tensor,
        packed: Packed,
        rows: Sequence[dict[str, Array]],
        spots: str,
        content: str,
        read: Callable[[Array, list[int]], T],
        tower: Callable[[Sequence[T]], list[Tensor]],
        bridge: Callable[[int], Callable[[Tensor], Tensor]],
    ) -> None:
        """Write what a tower makes of media over their placeholders; the same array in several rows is read once."""
        found: list[tuple[int, tuple[int, int]]] = []
        arrays: dict[tuple[int, int], Array] = {}
        pieces: dict[int, T] = {}
        for start, row in zip(packed.bounds, rows, strict=False):
            for number, spot in enumerate(row[spots].tolist() if spots in row else ()):
                array, task = row[f"{content}{number}"], int(row["adapter"])
                found.append((start + spot[0], (id(array), task)))
                arrays[id(array), task], pieces[id(array)] = array, read(array, spot)

        def make(missing: Sequence[tuple[int, int]]) -> list[Tensor]:
            different = {key: pieces[key] for key, _ in missing}
            states = dict(zip(different, tower([*different.values()]), strict=True))
            return [bridge(task)(states[key]) for key, task in missing]

        made = self.seen.look(arrays, make)
        for start, key in found:
            x[start : start + len(made[key])] = made[key]

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> Embeddings:  # noqa: ARG002
        """The vectors of one call, in its order."""
        return Embeddings(vectors=np.stack(arrays))
