"""jina-clip (Koukounas et al., 2024): texts and images in one space, a tower for each.

The image tower is EVA02. The text tower is the encoder of jina-embeddings-v3 with one adapter, which is always on (v2),
or JinaBERT (v1); `config.json` names it and leaves out its sizes, so those of the two published towers stand here, and
`hf_model_config_kwargs` may say others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fundament import media
from fundament.backbone.adapters import WOVEN, merged, read_terms, woven_layout
from fundament.backbone.bert import FLASH, UNUSED, read_shape
from fundament.backbone.checkpoint import Checkpoint, Config, Part, Source, Weights
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.mixed import count_all, rows_in_order
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.towers.eva02 import EVA02, load_eva02
from fundament.backbone.towers.images import (
    Patches,
    check_form,
    check_processor,
    crop_square,
    cut,
    levels,
    read_processor,
)
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.catalog import ModelSpec
from fundament.core import Array, Embed, Embeddings, Item, Media
from fundament.errors import CheckpointError

KWARGS = "hf_model_config_kwargs of config.json"

TEXT, VISION = "text_model.", "vision_model."
OUTSIDE = r"logit_scale"
"""What training needs and vectors do not."""

# The sizes of the towers that `hf_model_name_or_path` stands for.
XLM_ROBERTA: dict[str, Any] = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "rotary_emb_base": 20000.0,
}
JINA_BERT: dict[str, Any] = {
    "vocab_size": 30528,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}

# The first half of `gated_layers` is the gate.
JINA_BERT_LAYOUT: dict[str, Source] = FLASH | {
    "layers.{i}.gate": Part("encoder.layers.{i}.mlp.gated_layers", 0, 2),
    "layers.{i}.up": Part("encoder.layers.{i}.mlp.gated_layers", 1, 2),
    "layers.{i}.down": "encoder.layers.{i}.mlp.wo",
}

# Settings of another model than ours: where → key → the only value that is served.
_SERVED: dict[str, dict[str, Any]] = {
    "": {"add_projections": False},
    "text_config": {"pooler_type": "mean_pooler", "proj_type": None},
}


def recognises(config: dict[str, Any]) -> bool:
    """Jina's own name for both versions."""
    return config.get("model_type") == "jina_clip"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> "ClipEmbedder":
    """Both towers, strictly.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    config = checkpoint.config
    for where, keys in _SERVED.items():
        part = config[where] if where else config
        if other := {key: part[key] for key, served in keys.items() if part.get(key, served) != served}:
            raise CheckpointError(f"config.json, {where or 'at its top'}: {other} is not served, only {keys}")
    processor = read_processor(checkpoint)
    vision = Config(config["vision_config"], "vision_config of config.json")
    size = read_size(processor, vision)
    return ClipEmbedder(
        TextEmbedder(TextTokenizer(checkpoint.directory, spec.context), load_text(checkpoint, placement), "mean", spec),
        load_eva02(
            checkpoint,
            vision,
            torch.from_numpy(levels(processor["mean"], processor["std"])),
            placement,
            prefix=VISION,
            ignored=rf"text_model\..*|{OUTSIDE}",
        ),
        size=size,
        patch=vision["patch_size"],
    )


def read_size(processor: Config, vision: Config) -> int:
    """Height and width of what the tower sees, in pixels.

    Raises:
        CheckpointError: the image processing is of another kind, or of another size than the tower's.
    """
    check_processor(processor)
    if (mode := processor.get("resize_mode", "shortest")) != "shortest":
        raise CheckpointError(f"{processor.where}: resize_mode '{mode}' is not served, only 'shortest'")
    told, size = processor["size"], vision["image_size"]
    if told not in (size, [size, size], {"height": size, "width": size}, {"shortest_edge": size}):
        raise CheckpointError(f"{processor.where}: size {told} is not the image_size of vision_config, {size}")
    return int(size)


def load_text(checkpoint: Checkpoint, placement: Placement) -> Transformer:
    """The text tower; the tensor names tell which of the two.

    Raises:
        CheckpointError: neither, or it does not fit.
    """
    told = checkpoint.config["text_config"].get("hf_model_config_kwargs") or {}
    if checkpoint.has("roberta.emb_ln.weight"):
        return _xlm_roberta(checkpoint, Config(XLM_ROBERTA | told, KWARGS), placement)
    if checkpoint.has("encoder.layers.0.mlp.gated_layers.weight"):
        return _jina_bert(checkpoint, Config(JINA_BERT | told, KWARGS), placement)
    raise CheckpointError(
        f"{checkpoint.directory} has neither of the known text towers: its tensors are named neither "
        f"{TEXT}transformer.roberta.emb_ln.weight nor {TEXT}transformer.encoder.layers.0.mlp.gated_layers.weight"
    )


def _xlm_roberta(checkpoint: Checkpoint, config: Config, placement: Placement) -> Transformer:
    shape = replace(read_shape(config), positions="rotary", rope_theta=float(config["rotary_emb_base"]))
    if (n_adapters := len(config["lora_adaptations"])) != 1:
        raise CheckpointError(f"{KWARGS}: one adapter is always on, not {n_adapters} of them")
    exact = Placement(placement.device, torch.float32)
    prefixes = (f"{TEXT}transformer.roberta.",)
    (adapter,) = read_terms(checkpoint, config, shape, FLASH, exact, n_adapters=n_adapters, prefixes=prefixes)
    base = _read(checkpoint, shape, woven_layout(shape, FLASH), exact, prefixes)
    return Transformer(shape, merged(base, adapter, placement))


def _jina_bert(checkpoint: Checkpoint, config: Config, placement: Placement) -> Transformer:
    if placement.states == torch.float16:
        raise CheckpointError("this text tower overflows in float16, as ALiBi does; use --dtype bfloat16 or float32")
    shape = replace(read_shape(config), positions="alibi", gated=True, up_bias=False)
    return Transformer(shape, _read(checkpoint, shape, JINA_BERT_LAYOUT, placement, (f"{TEXT}transformer.",)))


def _read(
    checkpoint: Checkpoint, shape: Shape, layout: Mapping[str, Source], placement: Placement, prefixes: tuple[str, ...]
) -> Weights:
    return checkpoint.read(
        parameters(shape),
        layout,
        placement,
        prefixes=prefixes,
        ignored=rf"vision_model\..*|{OUTSIDE}|{UNUSED}|{WOVEN}",
    )


class ClipEmbedder:
    """Texts and images to dense vectors in one space.

    Args:
        text: the text tower.
        vision: the image tower.
        size: height and width of what it sees, in pixels.
        patch: height and width of a patch, in pixels.
    """

    def __init__(self, text: TextEmbedder, vision: EVA02, *, size: int, patch: int) -> None:
        self.text, self.vision = text, vision
        self.size, self.patch = size, patch
        self.n_bytes = text.n_bytes + vision.n_bytes

    def prepare(self, call: Embed) -> list[Item]:
        """One row per text, image and page; a batch has rows of one tower.

        Raises:
            InputError: an input that this model cannot read.
            TooLongError: a text longer than the context, without `truncate`.
        """
        return rows_in_order(call, lambda texts: count_all(self.text.rows(call, texts)), self._rows_of)

    def _rows_of(self, file: Media) -> list[Item]:
        rows, n = [], self.vision.n_tokens
        for picture in media.pictures(file):
            check_form(picture, file.origin)
            patches = cut(crop_square(picture, self.size), self.patch)
            features = {"pixels": patches.pixels}
            rows.append(Item(features=features, n_tokens=n, mate="image", n_counted=n, n_media={"image": n}))
        return rows

    def forward(self, items: Sequence[Item]) -> list[Array]:
        """One float32 vector `[dim]` per row."""
        if items[0].mate != "image":
            return self.text.forward(items)
        return [*self.vision([self.patches_of(item) for item in items]).cpu().numpy()]

    def patches_of(self, item: Item) -> Patches:
        """What the image tower sees of a row."""
        grid = self.size // self.patch
        return Patches(item.features["pixels"], grid, grid)

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> Embeddings:  # noqa: ARG002
        """The vectors of one call, in its order."""
        return Embeddings(vectors=np.stack(arrays))
