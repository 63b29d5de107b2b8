"""The vision towers of Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025): images of any size, packed.

Both turn by row and column and make one token of each square of patches. In Qwen2.5-VL most layers attend within
windows. The order of an image's patches is ours to choose, since their places are in the rotations: windows of one size
lie side by side, so that attention takes them in one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Config, Source, Weights
from fundament.backbone.device import Placement
from fundament.backbone.linear import Linear, read_activation
from fundament.backbone.packed import padded, rounded_closely, rows_of
from fundament.backbone.towers.images import Patches
from fundament.backbone.towers.vision import PatchEmbedding, grid_rotation
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.core import Array
from fundament.errors import CheckpointError

THETA = 10_000.0
PREFIXES = ("visual.", "model.visual.")

LAYOUT: dict[str, Source] = {
    "patches": "patch_embed.proj",
    "layers.{i}.qkv": "blocks.{i}.attn.qkv",
    "layers.{i}.out": "blocks.{i}.attn.proj",
    "layers.{i}.attention_norm": "blocks.{i}.norm1",
    "layers.{i}.mlp_norm": "blocks.{i}.norm2",
    "final_norm": "merger.ln_q",
    "merge_in": "merger.mlp.0",
    "merge_out": "merger.mlp.2",
}
PLAIN_MLP: dict[str, Source] = {"layers.{i}.up": "blocks.{i}.mlp.fc1", "layers.{i}.down": "blocks.{i}.mlp.fc2"}
GATED_MLP: dict[str, Source] = {
    "layers.{i}.gate": "blocks.{i}.mlp.gate_proj",
    "layers.{i}.up": "blocks.{i}.mlp.up_proj",
    "layers.{i}.down": "blocks.{i}.mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """What makes one of the towers.

    Attributes:
        layers: the transformer.
        patch: height and width of a patch, in pixels.
        frames: how many frames a patch spans; an image is that many times the same.
        merge: height and width, in patches, of what becomes one token.
        out: numbers of a token's state, those of the language model.
        window: height and width of a window, in tokens; None where all layers see the whole image.
        whole: layers that see the whole image.
    """

    layers: Shape
    patch: int
    frames: int
    merge: int
    out: int
    window: int | None = None
    whole: frozenset[int] = frozenset()

    @property
    def factor(self) -> int:
        """What both sides of an image are multiples of, in pixels: a token's height and width."""
        return self.patch * self.merge


def read_tower(config: Config, *, windowed: bool) -> TowerShape:
    """The tower that a `vision_config` describes: Qwen2.5-VL's where it is windowed, else Qwen2-VL's.

    Raises:
        CheckpointError: a key is missing, or windows that are no whole number of tokens.
    """
    hidden, n_heads = config["hidden_size" if windowed else "embed_dim"], config["num_heads"]
    layers = Shape(
        vocab=0,
        hidden=hidden,
        intermediate=config["intermediate_size"] if windowed else int(hidden * config["mlp_ratio"]),
        n_layers=config["depth"],
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden // n_heads,
        norm="rms" if windowed else "layer",
        norm_eps=1e-6,
        pre_norm=True,
        positions="rotary",
        rope_theta=THETA,
        gated=windowed,
        activation=read_activation(config.get("hidden_act", "silu" if windowed else "quick_gelu")),
    )
    patch, merge = config["patch_size"], config["spatial_merge_size"]
    tower = TowerShape(
        layers=layers,
        patch=patch,
        frames=config["temporal_patch_size"],
        merge=merge,
        out=config["out_hidden_size" if windowed else "hidden_size"],
    )
    if not windowed:
        return tower
    window, rest = divmod(config["window_size"], tower.factor)
    if rest or not window:
        raise CheckpointError(
            f"{config.where}: window_size {config['window_size']} is no multiple of {tower.factor}, a token's size"
        )
    return replace(tower, window=window, whole=frozenset(config["fullatt_block_indexes"]))


@dataclass(frozen=True, slots=True)
class Plan:
    """In which order an image's patches lie.

    Attributes:
        tokens: place of each token in the image, int64 `[tokens]`.
        windows: patches of each window.
        places: row and column of each patch, float32 `[patches, 2]`.
    """

    tokens: Array
    windows: Array
    places: Array


def plan(rows: int, columns: int, merge: int, window: int | None) -> Plan:
    """Larger windows come first, and so do their tokens, line by line; without windows the image is one.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        merge: patches of a token's side.
        window: tokens of a window's side.
    """
    size = (rows // merge, columns // merge)
    row, column = np.indices(size).reshape(2, -1)
    side = window or max(size)
    windows = row // side * -(-size[1] // side) + column // side
    sizes = np.bincount(windows)
    order = np.lexsort((windows, -sizes[windows]))
    inside = np.indices((merge, merge)).reshape(2, -1).T
    places = np.stack((row, column), axis=-1)[order, None] * merge + inside
    lengths = -np.sort(-sizes[sizes > 0]) * merge**2
    return Plan(order, lengths, places.reshape(-1, 2).astype(np.float32))


class QwenVision:
    """Images to states that the language model reads among its tokens'.

    Args:
        shape: what to build.
        weights: `patches.weight` `[hidden, 3 * patch * patch]`, `merge_in.*`, `merge_out.*`, and what the transformer
            names; its final norm is the merger's.
        levels: what the values of each channel become, float32 `[3, 256]`.
    """

    def __init__(self, shape: TowerShape, weights: Mapping[str, Tensor], levels: Tensor) -> None:
        self.shape = shape
        self.embedding = PatchEmbedding(levels, weights["patches.weight"])
        self.transformer = Transformer(shape.layers, weights)
        merger = {name: weights[name] for name in merger_parameters(shape)}
        self.merge_in = Linear(merger["merge_in.weight"], merger["merge_in.bias"])
        self.merge_out = Linear(merger["merge_out.weight"], merger["merge_out.bias"])
        self.n_bytes = self.embedding.n_bytes + self.transformer.n_bytes
        self.n_bytes += sum(tensor.nbytes for tensor in merger.values())

    @torch.inference_mode()
    def __call__(self, images: Sequence[Patches]) -> list[Tensor]:
        """The states of each image's tokens, line by line, `[tokens, out]`."""
        shape = self.shape
        plans = [plan(image.rows, image.columns, shape.merge, shape.window) for image in images]
        x = self.embedding([_ordered(image, plan, shape.merge) for image, plan in zip(images, plans, strict=True)])
        whole = rows_of([len(image.pixels) for image in images], x.device, fit=rounded_closely)
        windows = [length for plan in plans for length in plan.windows.tolist()]
        parts = rows_of(windows, x.device, fit=rounded_closely)
        places = torch.from_numpy(np.concatenate([plan.places for plan in plans])).to(x.device)
        cosines, sines = grid_rotation(places, shape.layers.head_dim, shape.layers.rope_theta, x.dtype)
        layers = [
            whole if shape.window is None or layer in shape.whole else parts for layer in range(shape.layers.n_layers)
        ]
        rotation = (padded(cosines, whole), padded(sines, whole))
        x = self.transformer.run(padded(x, whole), layers, rotation)
        x = self.merge_out(self.merge_in(x.view(-1, shape.merge**2 * x.shape[1]), "gelu"))
        lengths = [len(plan.tokens) for plan in plans]
        starts = accumulate(lengths, initial=0)
        line_by_line = np.concatenate(
            [start + np.argsort(plan.tokens) for start, plan in zip(starts, plans, strict=False)]
        )
        return list(x[torch.from_numpy(line_by_line).to(x.device)].split(lengths))


def _ordered(image: Patches, plan: Plan, merge: int) -> Patches:
    """The image with its patches in the order of the plan."""
    tokens = image.pixels.reshape(-1, merge**2, image.pixels.shape[1])[plan.tokens]
    return replace(image, pixels=tokens.reshape(image.pixels.shape))


def merger_parameters(shape: TowerShape) -> dict[str, tuple[int, ...]]:
    """What makes one token of several patches."""
    wide = shape.merge**2 * shape.layers.hidden
    return {
        "merge_in.weight": (wide, wide),
        "merge_in.bias": (wide,),
        "merge_out.weight": (shape.out, wide),
        "merge_out.bias": (shape.out,),
    }


def load_qwen_vision(
    checkpoint: Checkpoint, shape: TowerShape, levels: Tensor, placement: Placement, *, ignored: str
) -> QwenVision:
    """Read a tower, strictly.

    Args:
        checkpoint: where its tensors are.
        shape: what to build.
        levels: what the values of each channel become.
        placement: where it goes.
        ignored: a pattern of names that are not the tower's.

    Raises:
        CheckpointError: it does not fit.
    """
    named = parameters(shape.layers) | merger_parameters(shape)
    named["patches.weight"] = (shape.layers.hidden, 3, shape.frames, shape.patch, shape.patch)
    read = checkpoint.read(
        named,
        LAYOUT | (GATED_MLP if shape.layers.gated else PLAIN_MLP),
        placement,
        prefixes=PREFIXES,
        ignored=ignored,
    )

    def one(name: str) -> Tensor:
        if name == "patches.weight":
            # All frames of an image are the same, so what each frame is multiplied by can be summed before.
            return read[name].float().sum(2).flatten(1).to(placement.states)
        return read[name]

    return QwenVision(shape, Weights(read.keys(), one), levels)
