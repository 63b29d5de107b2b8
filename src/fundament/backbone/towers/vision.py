"""What vision towers share: patches as numbers, and rotations by row and column."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.linear import Linear
from fundament.backbone.positions import Rotation, rotation_by
from fundament.backbone.towers.images import Patches


class PatchEmbedding:
    """Patches to the first layer's inputs: bytes to numbers around zero, then a linear layer.

    Args:
        levels: what the 256 values of each channel become, float32 `[3, 256]`.
        weight: `[hidden, 3 * patch * patch]`.
        bias: `[hidden]`, or None.
    """

    def __init__(self, levels: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.linear = Linear(weight, bias)
        self.levels = levels.flatten().to(weight.device)
        self.dtype, self.n_bytes = weight.dtype, self.linear.n_bytes
        n_each = weight.shape[1] // 3
        self.channels = 256 * torch.arange(3, dtype=torch.int32, device=weight.device).repeat_interleave(n_each)

    def numbers(self, images: Sequence[Patches]) -> Tensor:
        """The patches of all images as the numbers that go in, float32 `[patches, 3 * patch * patch]`."""
        pixels = torch.from_numpy(np.concatenate([image.pixels for image in images])).to(self.levels.device)
        return self.levels[pixels.int().add_(self.channels)]

    def __call__(self, images: Sequence[Patches]) -> Tensor:
        """`[patches, hidden]`."""
        return self.linear(self.numbers(images).to(self.dtype))


def grid_rotation(places: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Rotations by two coordinates: the first half of the pairs turns by the row, the second by the column.

    Args:
        places: row and column of each token, float32 `[tokens, 2]`; at zero nothing is turned.
        head_dim: numbers of a head, a multiple of four.
        theta: the base of the frequencies.
        dtype: of the result; angles are float32.
    """
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, device=places.device, dtype=torch.float32) / half)
    return rotation_by((places[:, :, None] * frequencies).flatten(1), dtype)
