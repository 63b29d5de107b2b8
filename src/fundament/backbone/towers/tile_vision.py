"""jina-vlm's vision tower: SigLIP2's (Tschannen et al. 2025) over crops, cells of which are pooled by attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.linear import Linear
from fundament.backbone.packed import padded, rows_of
from fundament.backbone.transformer import Shape, Transformer

_CROPS = 4  # that run together: a crop has hundreds of patches


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """What makes a tower.

    Attributes:
        layers: the transformer; its table of positions is that of a crop's patches.
        patch: numbers of a patch.
        side: patches of a crop's side.
        cell: patches of a cell's side.
        read: the layers whose states are read, laid one after the other; the number of layers means the last norm's.
        n_heads: of the pooling.
        head_dim: of the pooling.
        pooled: numbers that the pooling gives.
        inner: of the projector.
        out: numbers of a token's state, those of the language model.
    """

    layers: Shape
    patch: int
    side: int
    cell: int
    read: tuple[int, ...]
    n_heads: int
    head_dim: int
    pooled: int
    inner: int
    out: int

    @property
    def wide(self) -> int:
        """Numbers of a patch's states together."""
        return self.layers.hidden * len(self.read)


def head_parameters(shape: TileShape) -> dict[str, tuple[int, ...]]:
    """What makes tokens of patches, beside the transformer."""
    attended = shape.n_heads * shape.head_dim
    return {
        "patches.weight": (shape.layers.hidden, shape.patch),
        "patches.bias": (shape.layers.hidden,),
        "pads.weight": (2, shape.wide),
        "pool_q.weight": (attended, shape.wide),
        "pool_q.bias": (attended,),
        "pool_kv.weight": (2 * attended, shape.wide),
        "pool_kv.bias": (2 * attended,),
        "pool_out.weight": (shape.pooled, attended),
        "pool_out.bias": (shape.pooled,),
        "gate.weight": (shape.inner, shape.pooled),
        "up.weight": (shape.inner, shape.pooled),
        "down.weight": (shape.out, shape.inner),
    }


class TileVision:
    """Crops to states that the language model reads among its tokens'.

    Args:
        shape: what to build.
        weights: what `head_parameters` and `transformer.parameters` name.
    """

    def __init__(self, shape: TileShape, weights: Mapping[str, Tensor]) -> None:
        self.shape = shape
        self.transformer = Transformer(shape.layers, weights)

        def linear(name: str) -> Linear:
            return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        self.patches, self.pool_q, self.pool_kv = linear("patches"), linear("pool_q"), linear("pool_kv")
        self.pool_out, self.gate, self.up, self.down = (linear(name) for name in ("pool_out", "gate", "up", "down"))
        self.pads = weights["pads.weight"]
        parts = (self.patches, self.pool_q, self.pool_kv, self.pool_out, self.gate, self.up, self.down)
        self.n_bytes = self.transformer.n_bytes + self.pads.nbytes + sum(part.n_bytes for part in parts)

    @torch.inference_mode()
    def __call__(self, crops: Tensor) -> Tensor:
        """The states of each cell of one picture's crops, line by line, `[crops * cells * cells, out]`.

        Args:
            crops: float32 `[crops, patches, patch]`, all of one picture.
        """
        states = []
        for start in range(0, len(crops), _CROPS):
            features = self._features(part := crops[start : start + _CROPS])
            if start + len(part) == len(crops):
                # The publishers' masks lie one crop beside the crops, so that the last has the mark of a cut picture;
                # the model was trained so.
                features[-1] += self.pads[1]
            pooled = self._pool(features)
            states.append(self.down(self.up.multiply(pooled, self.gate(pooled, "silu"))))
        return torch.cat(states)

    def _features(self, crops: Tensor) -> Tensor:
        """What is read of each patch, `[crops, patches, wide]`."""
        n, n_patches = crops.shape[:2]
        packed = rows_of([n_patches] * n, crops.device)
        x = self.patches(crops.flatten(0, 1).to(self.pads.dtype))
        assert self.transformer.positions is not None
        x = padded(x + self.transformer.positions.repeat(n, 1), packed)
        found: dict[int, Tensor] = {}
        read = self.shape.read
        for number, layer in enumerate(self.transformer.layers[: max(read) + 1]):
            x = layer(x, packed, None, None)
            found[number] = x[: packed.n_tokens]
        if (last := self.shape.layers.n_layers) in read:
            assert self.transformer.final_norm is not None
            found[last] = self.transformer.final_norm(x[: packed.n_tokens])
        features: Tensor = torch.cat([found[number] for number in read], dim=-1).unflatten(0, (n, n_patches))
        black: Tensor = (crops == -1).flatten(1).all(dim=1)  # says nothing
        return features.masked_fill(black[:, None, None], 0)

    def _pool(self, features: Tensor) -> Tensor:
        """One state per cell: attention of the mean of its patches to each of them, `[cells, pooled]`."""
        shape = self.shape
        beyond = -shape.side % shape.cell
        grid = F.pad(features.unflatten(1, (shape.side, shape.side)), (0, 0, 0, beyond, 0, beyond))
        cells = grid.unflatten(2, (-1, shape.cell)).unflatten(1, (-1, shape.cell)).transpose(2, 3)
        cells = cells.flatten(3, 4).flatten(0, 2)  # [cells, patches of a cell, wide]
        q = self.pool_q(cells.mean(dim=1)).unflatten(-1, (shape.n_heads, 1, shape.head_dim))
        k, v = self.pool_kv(cells).unflatten(-1, (2, shape.n_heads, shape.head_dim)).permute(2, 0, 3, 1, 4)
        return self.pool_out(F.scaled_dot_product_attention(q, k, v).flatten(1))


def layers_read(told: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """The places of layers that are counted from the end, the last norm's states being the last."""
    return tuple(number % (n_layers + 1) for number in told)
