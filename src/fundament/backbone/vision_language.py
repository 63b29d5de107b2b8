"""A language model that reads pictures among its tokens: a vision tower, and a transformer with M-RoPE."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.llama import IGNORED, read_shape
from fundament.backbone.llama import LAYOUT as LLAMA
from fundament.backbone.mrope import Slot, mrope_rotation, positions
from fundament.backbone.packed import Packed, rounded_closely
from fundament.backbone.rows import pack_items
from fundament.backbone.towers.images import Patches, levels, read_processor
from fundament.backbone.towers.qwen_vision import QwenVision, TowerShape, load_qwen_vision, read_tower
from fundament.backbone.towers.states import TowerStates
from fundament.backbone.transformer import Adapter, Shape, Transformer, parameters
from fundament.core import Array, Item
from fundament.errors import CheckpointError

LANGUAGE_PREFIXES = ("model.", "model.language_model.", "language_model.")
LAYOUT: dict[str, Source] = {name: LLAMA[name] for name in LLAMA if not name.endswith(("q_norm", "k_norm"))}

VISUAL = r"(model\.)?visual\..*"


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
