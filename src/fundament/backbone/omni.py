"""A text embedder that reads pictures and sounds among its tokens: jina-embeddings-v5-omni.

Every task has its own adapter, its own layers from the towers' states to the language model's, and its own embeddings
of the tokens that mark media. All of them belong to the row, so that rows of all tasks share a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import Linear
from fundament.backbone.mixed import Room, count_all
from fundament.backbone.omni_reader import OmniReader, Row
from fundament.backbone.packed import Packed, edge_of
from fundament.backbone.positions import rotary_angles
from fundament.backbone.rows import pack_items, unsort
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.audio import AudioTower
from fundament.backbone.towers.images import Patches
from fundament.backbone.towers.qwen3_vision import Qwen3Vision
from fundament.backbone.towers.sounds import Frames
from fundament.backbone.towers.states import TowerStates
from fundament.backbone.transformer import Transformer
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Embeddings, Group, Item, Media

T = TypeVar("T")


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


class OmniEmbedder:
    """Texts, images, videos, sounds, and groups of them, to dense vectors: the state of a row's last token.

    Args:
        tokenizer: the checkpoint's own.
        transformer: the language model.
        vision: the tower for pictures.
        audio: the tower for sounds.
        parts: of each task, in the order of the transformer's adapters.
        reader: what makes rows of media.
        spec: what each task means.
        adapters: the place of each adapter that the spec's tasks name.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        transformer: Transformer,
        vision: Qwen3Vision,
        audio: AudioTower,
        parts: Sequence[TaskParts],
        reader: OmniReader,
        spec: ModelSpec,
        adapters: Mapping[str, int],
    ) -> None:
        self.text = TextEmbedder(tokenizer, transformer, "last", spec, adapters)
        self.vision, self.audio = vision, audio
        self.parts, self.reader, self.spec = list(parts), reader, spec
        self.mark_rows = torch.stack([part.marks for part in parts])
        self.mark_numbers = np.full(len(transformer.tokens), -1)
        special = reader.marks.special
        self.mark_numbers[list(special)] = np.arange(len(special))
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
        files: dict[Media, Row] = {}
        room = Room()
        prompt, adapter = self.text.prompt_of(call), self.text.adapter_of(call.task)
        for place, value in enumerate(call.inputs):
            if isinstance(value, str):
                continue
            key = tuple(value.parts) if isinstance(value, Group) else value
            if key not in read_before:
                parts = self.reader.rows(value, prompt, files, truncate=call.truncate)
                read_before[key] = room.taken(value, [self.reader.item(row, adapter, place) for row in parts])
            rows[place] = read_before[key]
        return [row for place in range(len(call.inputs)) for row in rows[place]]

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
