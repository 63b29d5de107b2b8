"""The EVA02 vision tower (Fang et al. 2023) of jina-clip: a pre-norm transformer with rotations by row and column.

An image has one size, so its patches have one grid. The checkpoint turns neighbouring numbers of a head against each
other; the transformer here turns its first half against its second. Reordering queries and keys makes them one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Source, Weights
from fundament.backbone.device import Placement
from fundament.backbone.packed import edge_of, rows_of
from fundament.backbone.towers.images import Patches
from fundament.backbone.towers.projections import apart, together
from fundament.backbone.towers.vision import PatchEmbedding, grid_rotation
from fundament.backbone.transformer import Shape, Transformer
from fundament.errors import CheckpointError

THETA = 10_000.0

LAYOUT: dict[str, Source] = {
    "cls.weight": "cls_token",
    "table.weight": "pos_embed",
    "patches": "patch_embed.proj",
    "layers.{i}.q": "blocks.{i}.attn.q_proj",
    "layers.{i}.k": "blocks.{i}.attn.k_proj",
    "layers.{i}.v": "blocks.{i}.attn.v_proj",
    "layers.{i}.q.bias": "blocks.{i}.attn.q_bias",
    "layers.{i}.v.bias": "blocks.{i}.attn.v_bias",
    "layers.{i}.mixed_norm": "blocks.{i}.attn.inner_attn_ln",
    "layers.{i}.out": "blocks.{i}.attn.proj",
    "layers.{i}.attention_norm": "blocks.{i}.norm1",
    "layers.{i}.gate": "blocks.{i}.mlp.w1",
    "layers.{i}.up": "blocks.{i}.mlp.w2",
    "layers.{i}.up_norm": "blocks.{i}.mlp.ffn_ln",
    "layers.{i}.down": "blocks.{i}.mlp.w3",
    "layers.{i}.mlp_norm": "blocks.{i}.norm2",
    "final_norm": "norm",
}

IGNORED = r".*rope\.freqs_(cos|sin)"
"""Tables of the rotations, which are computed here."""

# What makes the tower the one that is built here: key of `vision_config` → its only value that is served.
_SERVED: dict[str, Any] = {
    "rope_embeddings": True,
    "naive_swiglu": True,
    "subln": True,
    "qkv_bias": True,
    "post_norm": False,
    "ls_init_value": None,
    "proj_type": None,
    "global_average_pool": False,
}


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The transformer that a `vision_config` describes.

    Raises:
        CheckpointError: another kind of tower, or a key that is missing.
    """
    if other := {key: config[key] for key, served in _SERVED.items() if config.get(key, served) != served}:
        raise CheckpointError(f"vision_config asks for a tower that is not served: {other}")
    n_heads = config["width"] // config["head_width"]
    return Shape(
        vocab=0,
        hidden=config["width"],
        intermediate=int(config["width"] * config["mlp_ratio"]),
        n_layers=config["layers"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=config["head_width"],
        norm_eps=1e-6,
        pre_norm=True,
        positions="rotary",
        rope_theta=THETA,
        gated=True,
        activation="silu",
        inner_norms=True,
    )


class EVA02:
    """Images of one size to a vector each.

    Args:
        shape: of the transformer.
        weights: `cls.weight` `[1, 1, hidden]`, `table.weight` `[1, 1 + patches, hidden]`, `patches.*`, and what the
            transformer names.
        levels: what the values of each channel become, float32 `[3, 256]`.
        grid: patches from top to bottom, as many as from left to right.
        grid_trained: patches of the grid that the rotations were trained on; positions are stretched to it.
    """

    def __init__(
        self, shape: Shape, weights: Mapping[str, Tensor], levels: Tensor, *, grid: int, grid_trained: int
    ) -> None:
        table = weights["table.weight"][0]
        self.embedding = PatchEmbedding(levels, weights["patches.weight"].flatten(1), weights["patches.bias"])
        self.first = weights["cls.weight"][0] + table[:1]
        self.places = table[1:]
        self.transformer = Transformer(shape, weights)
        self.n_tokens = len(table)
        self.n_bytes = self.transformer.n_bytes + self.embedding.n_bytes + table.nbytes
        steps = torch.arange(grid, dtype=torch.float32, device=table.device) / grid * grid_trained
        places = torch.cat((steps.new_zeros(1, 2), torch.cartesian_prod(steps, steps)))
        self.rotation = grid_rotation(places, shape.head_dim, shape.rope_theta, table.dtype)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Patches]) -> Tensor:
        """The state of each image's first token after the last norm, float32 `[images, hidden]`."""
        n, hidden = len(images), self.places.shape[1]
        patches = self.embedding(images).view(n, -1, hidden) + self.places
        x = torch.cat((self.first.expand(n, 1, hidden), patches), dim=1).flatten(0, 1)
        packed = rows_of([self.n_tokens] * n, x.device, fit=int)
        cosines, sines = (part.repeat(n, 1, 1) for part in self.rotation)
        layers = [packed] * len(self.transformer.layers)
        return self.transformer.run(x, layers, (cosines, sines), edge_of(packed, "first")).float()


def load_eva02(
    checkpoint: Checkpoint, config: Mapping[str, Any], levels: Tensor, placement: Placement, prefix: str, ignored: str
) -> EVA02:
    """Read a tower, strictly.

    Args:
        checkpoint: where its tensors are.
        config: the `vision_config`.
        levels: what the values of each channel become.
        placement: where it goes.
        prefix: before the tower's names.
        ignored: a pattern of names that are not the tower's.

    Raises:
        CheckpointError: it does not fit.
    """
    shape = read_shape(config)
    image, patch, trained = config["image_size"], config["patch_size"], config["pt_hw_seq_len"]
    grid = image // patch
    if not config["intp_freq"] and grid != trained:
        raise CheckpointError(
            f"vision_config: a grid of {grid} patches needs intp_freq, since pt_hw_seq_len is {trained}"
        )
    named = stored(shape, grid * grid, patch)
    read = checkpoint.read(named, LAYOUT, placement, prefixes=(prefix,), ignored=rf"{ignored}|{IGNORED}")
    return EVA02(shape, reordered(shape, read), levels, grid=grid, grid_trained=trained)


def stored(shape: Shape, n_patches: int, patch: int) -> dict[str, tuple[int, ...]]:
    """Every parameter as the checkpoint has it."""
    return apart(shape) | {
        "cls.weight": (1, 1, shape.hidden),
        "table.weight": (1, 1 + n_patches, shape.hidden),
        "patches.weight": (shape.hidden, 3, patch, patch),
        "patches.bias": (shape.hidden,),
    }


def reordered(shape: Shape, read: Weights) -> Weights:
    """The tower's parameters: queries and keys have each head's even numbers first, then the odd ones."""
    order = torch.arange(shape.n_heads * shape.head_dim).view(shape.n_heads, -1, 2).transpose(1, 2).flatten()
    return together(shape, read, order)
