"""Rows of tokens with pictures among them, as Qwen's language models read them.

A row's features are `ids`, of which a picture's are placeholders; `adapter`; and, where it has pictures, `slots` int64
`[pictures, 3]` (first token, rows and columns of tokens) with the patches of each as `pixels0`, `pixels1`, ….
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fundament.backbone.checkpoint import Config
from fundament.backbone.mrope import Slot
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.images import Patches, Pixels, check_form, check_processor, cut, fitting_size, resize
from fundament.backbone.towers.qwen_vision import TowerShape
from fundament.core import Array
from fundament.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Sizes:
    """What pictures are resized to.

    Attributes:
        factor: both sides are multiples of it, in pixels: height and width of a token.
        patch: height and width of a patch, in pixels.
        least: pixels of a picture.
        most: pixels of a picture.
    """

    factor: int
    patch: int
    least: int
    most: int

    def patches(self, picture: Pixels, field: str) -> Patches:
        """A picture as the tower reads it.

        Raises:
            InputError: it is hardly more than a line.
        """
        check_form(picture, field)
        height, width = picture.shape[:2]
        tall, wide = fitting_size(height, width, factor=self.factor, least=self.least, most=self.most)
        return cut(resize(picture, tall, wide), self.patch, self.merge)

    @property
    def merge(self) -> int:
        """Height and width of a token, in patches."""
        return self.factor // self.patch

    def grid(self, patches: Patches) -> tuple[int, int]:
        """Rows and columns of the tokens that stand for a picture."""
        return patches.rows // self.merge, patches.columns // self.merge

    def n_patches(self, slots: Sequence[Slot]) -> int:
        """Patches that the tower reads of a row's pictures."""
        return sum(slot.rows * slot.columns for slot in slots) * self.merge**2


def read_sizes(processor: Config, tower: TowerShape, *, pixels: tuple[int, int] | None) -> Sizes:
    """What `preprocessor_config.json` says of sizes.

    Args:
        processor: the file.
        tower: what reads the pictures.
        pixels: the least and the most, where the model's own code sets them; None leaves them to the file.

    Raises:
        CheckpointError: other image processing than the tower's, or no limits.
    """
    check_processor(processor)
    served = {"patch_size": tower.patch, "merge_size": tower.merge, "temporal_patch_size": tower.frames}
    if other := {key: processor[key] for key, value in served.items() if processor.get(key, value) != value}:
        raise CheckpointError(f"{processor.where}: {other} does not go with the vision_config of config.json, {served}")
    size = processor.get("size") or {}
    found = {}
    for name, key in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        found[name] = processor[name] if processor.get(name) is not None or key not in size else size[key]
    least, most = pixels or (int(found["min_pixels"]), int(found["max_pixels"]))
    return Sizes(tower.factor, tower.patch, least, most)


class Prompt:
    """Token ids around pictures, put together from texts and slots.

    Args:
        tokenizer: the checkpoint's own.
        start: the id before a picture.
        stop: the id after it.
        pad: the id that stands for each of its tokens.
        sizes: what pictures are resized to.
    """

    def __init__(self, tokenizer: TextTokenizer, *, start: int, stop: int, pad: int, sizes: Sizes) -> None:
        self.tokenizer, self.sizes = tokenizer, sizes
        self.start, self.stop, self.pad = start, stop, pad

    def read(self, parts: Sequence[str | Patches]) -> tuple[dict[str, Array], list[Slot]]:
        """The features of a row, without its adapter, and where its pictures are.

        A text's own marks for pictures are tokens like any other: only a part that is one has a slot.
        """
        ids: list[Array] = []
        slots: list[Slot] = []
        features: dict[str, Array] = {}
        n = 0
        for part in parts:
            if isinstance(part, str):
                [piece] = self.tokenizer.pieces([part])
            else:
                slot = Slot(n + 1, *self.sizes.grid(part))
                features[f"pixels{len(slots)}"] = part.pixels
                slots.append(slot)
                piece = np.array([self.start, *[self.pad] * (slot.stop - slot.start), self.stop], dtype=np.int64)
            ids.append(piece)
            n += len(piece)
        features["ids"] = np.concatenate(ids)
        if slots:
            features["slots"] = np.array([(slot.start, slot.rows, slot.columns) for slot in slots])
        return features, slots
