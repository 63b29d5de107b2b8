"""The vision tower of Qwen3-VL: patches of two frames, a learned table of places that is stretched, and rotations."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import read_activation
from fundament.backbone.packed import padded, rows_of
from fundament.backbone.towers.images import Patches
from fundament.backbone.towers.vision import PatchEmbedding, grid_rotation
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.errors import CheckpointError

THETA = 10_000.0
PREFIXES = ("vision_tower.", "visual.", "model.vision_tower.", "model.visual.")

LAYOUT: dict[str, Source] = {
    "patches": "patch_embed.proj",
    "places.weight": "pos_embed.weight",
    "layers.{i}.qkv": "blocks.{i}.attn.qkv",
    "layers.{i}.out": "blocks.{i}.attn.proj",
    "layers.{i}.attention_norm": "blocks.{i}.norm1",
    "layers.{i}.up": "blocks.{i}.mlp.linear_fc1",
    "layers.{i}.down": "blocks.{i}.mlp.linear_fc2",
    "layers.{i}.mlp_norm": "blocks.{i}.norm2",
}


def read_shape(config: Config) -> Shape:
    """The transformer that a `vision_config` describes.

    Raises:
        CheckpointError: a key is missing, or states of inner layers are asked for.
    """
    if config.get("deepstack_visual_indexes"):
        raise CheckpointError(f"{config.where}: deepstack_visual_indexes is not served")
    hidden, n_heads = config["hidden_size"], config["num_heads"]
    return Shape(
        vocab=0,
        hidden=hidden,
        intermediate=config["intermediate_size"],
        n_layers=config["depth"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden // n_heads,
        norm_eps=1e-6,
        pre_norm=True,
        final_norm=False,
        positions="rotary",
        rope_theta=THETA,
        activation=read_activation(config.get("hidden_act", "gelu_pytorch_tanh")),
    )


class Qwen3Vision:
    """Pictures, each of two frames, to states of their patches.

    Args:
        shape: of the transformer.
        weights: `patches.*`, `places.weight` `[side * side, hidden]`, and what the transformer names.
        levels: what the values of each channel become, float32 `[3, 256]`.
        merge: patches come in squares of this many by this many.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], levels: Tensor, *, merge: int) -> None:
        self.shape, self.merge = shape, merge
        self.embedding = PatchEmbedding(levels, weights["patches.weight"].flatten(1), weights["patches.bias"])
        self.places = weights["places.weight"]
        self.side = round(len(self.places) ** 0.5)
        self.transformer = Transformer(shape, weights)
        self.n_bytes = self.embedding.n_bytes + self.transformer.n_bytes + self.places.nbytes

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Patches]) -> list[Tensor]:
        """The states after the last layer, without a norm, of each picture: `[patches, hidden]`."""
        x = self.embedding(pictures)
        grids = [_grid(picture.rows, picture.columns, self.merge) for picture in pictures]
        spots = [_spots(grid, picture, self.side) for grid, picture in zip(grids, pictures, strict=True)]
        x = x + self._stretched(*(np.concatenate(parts, axis=1) for parts in zip(*spots, strict=True))).to(x.dtype)
        lengths = [len(grid) for grid in grids]
        packed = rows_of(lengths, x.device)
        places = torch.from_numpy(np.concatenate(grids)).float().to(x.device)
        cosines, sines = grid_rotation(places, self.shape.head_dim, THETA, x.dtype)
        rotation = padded(cosines, packed), padded(sines, packed)
        states = self.transformer.run(padded(x, packed), [packed] * self.shape.n_layers, rotation)
        return list(states.split(lengths))

    def _stretched(self, rows: np.ndarray, shares: np.ndarray) -> Tensor:
        """The table stretched over pictures: its rows are mixed by nearness, float32 `[patches, hidden]`.

        Args:
            rows: of the table, four for each patch, int64 `[4, patches]`.
            shares: what each of them counts, float32 `[4, patches]`.
        """
        device = self.places.device
        found = torch.zeros(rows.shape[1], self.places.shape[1], device=device)
        for row, share in zip(torch.from_numpy(rows).to(device), torch.from_numpy(shares).to(device), strict=True):
            found += self.places[row] * share[:, None]
        return found


def _spots(grid: np.ndarray, picture: Patches, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Between which places of a table of `side * side` each patch lies: their rows and shares, `[4, patches]` each."""
    sizes = np.array([picture.rows, picture.columns])
    spot = grid.astype(np.float32) * (side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
    low = np.floor(spot).astype(np.int64)
    high, share = np.minimum(low + 1, side - 1), spot - low
    corners = [*product(((low, 1 - share), (high, share)), repeat=2)]
    rows = np.stack([row[:, 0] * side + column[:, 1] for (row, _), (column, _) in corners])
    shares = np.stack([(by_row[:, 0] * by_column[:, 1]).astype(np.float32) for (_, by_row), (_, by_column) in corners])
    return rows, shares


def _grid(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch, in the order of `images.cut`, int64 `[patches, 2]`."""
    places = np.indices((rows, columns)).transpose(1, 2, 0)
    squares = places.reshape(rows // merge, merge, columns // merge, merge, 2)
    return squares.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def load_qwen3_vision(
    checkpoint: Checkpoint, config: Config, levels: Tensor, placement: Placement, *, ignored: str
) -> Qwen3Vision:
    """Read a tower, strictly; `ignored` is a pattern of names that are not its own.

    Raises:
        CheckpointError: it does not fit.
    """
    shape = read_shape(config)
    patch = config["patch_size"]
    named = parameters(shape) | {
        "patches.weight": (shape.hidden, 3, config["temporal_patch_size"], patch, patch),
        "patches.bias": (shape.hidden,),
        "places.weight": (config["num_position_embeddings"], shape.hidden),
    }
    read = checkpoint.read(named, LAYOUT, placement, prefixes=PREFIXES, ignored=ignored)
    return Qwen3Vision(shape, read, levels, merge=config["spatial_merge_size"])
