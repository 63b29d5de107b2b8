"""A language model that reads pictures among its tokens: a vision tower, and a transformer with M-RoPE.

A row's features are `ids`, of which a picture's are placeholders; `adapter`; and, where it has pictures, `slots` int64
`[pictures, 3]` (first token, rows and columns of tokens) with the patches of each as `pixels0`, `pixels1`, ….
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.images import (
    Patches,
    Pixels,
    check_form,
    check_processor,
    cut,
    fitting_size,
    levels,
    read_processor,
    resize,
)
from fundament.backbone.llama import IGNORED, read_shape
from fundament.backbone.llama import LAYOUT as LLAMA
from fundament.backbone.mrope import Slot, mrope_rotation, positions
from fundament.backbone.packed import Packed, rounded_closely
from fundament.backbone.qwen_vision import QwenVision, TowerShape, load_qwen_vision, read_tower
from fundament.backbone.rows import pack_items
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.tower_states import TowerStates
from fundament.backbone.transformer import Adapter, Shape, Transformer, parameters
from fundament.core import Array, Item
from fundament.errors import CheckpointError

LANGUAGE_PREFIXES = ("model.", "model.language_model.", "language_model.")
LAYOUT: dict[str, Source] = {name: LLAMA[name] for name in LLAMA if not name.endswith(("q_norm", "k_norm"))}

VISUAL = r"(model\.)?visual\..*"


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
        return cut(resize(picture, tall, wide), self.patch, self.factor // self.patch)

    def grid(self, patches: Patches) -> tuple[int, int]:
        """Rows and columns of the tokens that stand for a picture."""
        merge = self.factor // self.patch
        return patches.rows // merge, patches.columns // merge


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


def n_patches(slots: Sequence[Slot], sizes: Sizes) -> int:
    """Patches that the tower reads of a row's pictures."""
    return sum(slot.rows * slot.columns for slot in slots) * (sizes.factor // sizes.patch) ** 2


class VisionLanguage:
    """Rows of token ids and pictures to hidden states.

    Args:
        transformer: the language model.
        vision: the tower.
        sections: frequencies of the rotations that turn by time, row and column.
    """

    def __init__(self, transformer: Transformer, vision: QwenVision, sections: Sequence[int]) -> None:
        self.transformer, self.vision, self.sections = transformer, vision, tuple(sections)
        self.seen: TowerStates[int] = TowerStates()
        self.n_bytes = transformer.n_bytes + vision.n_bytes + self.seen.capacity_bytes

    def __call__(self, items: Sequence[Item]) -> tuple[Packed, list[int], Tensor]:
        """The batch, the place of each of its rows in `items`, and its states after the last norm, `[tokens, hidden]`.

        Runs in inference mode, which the caller enters.
        """
        device, shape = self.transformer.device, self.transformer.shape
        packed, order = pack_items(items, device, fit=rounded_closely)
        rows = [items[place].features for place in order]
        slots = [_slots(row) for row in rows]
        places = torch.zeros(3, len(packed.ids), dtype=torch.int64)
        found = [positions(len(row["ids"]), inside) for row, inside in zip(rows, slots, strict=True)]
        places[:, : packed.n_tokens] = torch.from_numpy(np.concatenate(found, axis=1))
        x = self.transformer.embed(packed)
        self._put_in(x, packed, rows, slots)
        rotation = mrope_rotation(places.to(device), self.sections, shape.head_dim, shape.rope_theta, x.dtype)
        return packed, order, self.transformer.run(x, [packed] * shape.n_layers, rotation)

    def _put_in(
        self, x: Tensor, packed: Packed, rows: Sequence[dict[str, Array]], slots: Sequence[Sequence[Slot]]
    ) -> None:
        """Write the states of pictures where their placeholders are; what several rows share is read once."""
        images: dict[int, Patches] = {}
        merge = self.vision.shape.merge
        for row, inside in zip(rows, slots, strict=True):
            for number, slot in enumerate(inside):
                pixels = row[f"pixels{number}"]
                images[id(pixels)] = Patches(pixels, slot.rows * merge, slot.columns * merge)
        if not images:
            return
        states = self.seen.look(
            {key: image.pixels for key, image in images.items()},
            lambda missing: self.vision([images[key] for key in missing]),
        )
        for start, row, inside in zip(packed.bounds, rows, slots, strict=False):
            for number, slot in enumerate(inside):
                x[start + slot.start : start + slot.stop] = states[id(row[f"pixels{number}"])]


def _slots(features: dict[str, Array]) -> list[Slot]:
    return [Slot(*numbers) for numbers in features["slots"].tolist()] if "slots" in features else []


def read_language(config: Config) -> tuple[Shape, list[int]]:
    """The language model and the sections of its rotations; `config.json` has its keys at the top or in `text_config`.

    Raises:
        CheckpointError: a setting that is not served.
    """
    told = Config(config["text_config"], f"text_config of {config.where}") if config.get("text_config") else config
    if told.get("use_sliding_window"):
        raise CheckpointError(f"{told.where}: use_sliding_window is not served")
    key = "rope_parameters" if told.get("rope_parameters") else "rope_scaling"
    rope = Config(told[key], f"{key} of {told.where}")
    kinds = {rope.get("rope_type", "default"), rope.get("type", "default")}
    if not kinds <= {"default", "mrope"}:  # two names of one thing
        raise CheckpointError(f"{rope.where}: rotations of type {sorted(kinds)} are not served")
    plain = {"rope_theta": rope.get("rope_theta")}
    shape = read_shape(
        Config({"hidden_act": "silu", **told, "rope_scaling": None, "rope_parameters": plain}, told.where)
    )
    sections = [int(number) for number in rope["mrope_section"]]
    if len(sections) != 3 or sum(sections) != shape.head_dim // 2:
        wanted = f"three numbers with the sum {shape.head_dim // 2}"
        raise CheckpointError(f"{rope.where}: mrope_section should be {wanted}, not {sections}")
    return replace(shape, causal=True, qkv_bias=True), sections


def load_vision_language(
    checkpoint: Checkpoint,
    placement: Placement,
    tower: TowerShape,
    adapters: Sequence[Adapter] = (),
    *,
    others: str,
) -> VisionLanguage:
    """Read both, strictly.

    Args:
        checkpoint: where the files are.
        placement: where the weights go.
        tower: what kind of tower.
        adapters: of the language model.
        others: a pattern of names that are of neither.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    shape, sections = read_language(checkpoint.config)
    processor = read_processor(checkpoint)
    if tower.out != shape.hidden:
        raise CheckpointError(
            f"{checkpoint.directory}: pictures' states have {tower.out} numbers, the language model's {shape.hidden}"
        )
    vision = load_qwen_vision(
        checkpoint,
        tower,
        torch.from_numpy(levels(processor["image_mean"], processor["image_std"])),
        placement,
        ignored=r"(?!(model\.)?visual\.).*",
    )
    language = checkpoint.read(
        parameters(shape),
        LAYOUT,
        placement,
        prefixes=LANGUAGE_PREFIXES,
        ignored=rf"{VISUAL}|{IGNORED}|{others}",
    )
    return VisionLanguage(Transformer(shape, language, adapters), vision, sections)


def read_tower_of(checkpoint: Checkpoint) -> TowerShape:
    """The tower that a checkpoint has; its tensor names tell which of the two kinds.

    Raises:
        CheckpointError: a key is missing.
    """
    config = Config(checkpoint.config["vision_config"], "vision_config of config.json")
    return read_tower(config, windowed=checkpoint.has("blocks.0.mlp.gate_proj.weight"))
