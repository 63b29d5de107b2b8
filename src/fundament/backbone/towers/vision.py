"""What vision towers share: patches as numbers, and rotations by row and column."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.linear import Linear
from fundament.backbone.positions import Rotation, rotation_by
from fundament.backbone.towers.images import Patches, Pixels


class PatchEmbedding:
    """Patches to the first layer's inputs: bytes to numbers around zero, then a linear layer.

    Where the layer reads several frames at once, a picture of one frame stands for each of them.

    Args:
        levels: what the 256 values of each channel become, float32 `[3, 256]`.
        weight: `[hidden, 3 * frames * patch * patch]`.
        bias: `[hidden]`, or None.
    """

    def __init__(self, levels: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.linear = Linear(weight, bias)
        self.levels = levels.flatten().to(weight.device)
        self.dtype, self.n_bytes = weight.dtype, self.linear.n_bytes
        n_each = weight.shape[1] // 3
        self.channels = 256 * torch.arange(3, dtype=torch.int32, device=weight.device).repeat_interleave(n_each)

    def numbers(self, images: Sequence[Patches]) -> Tensor:
        """The patches of all images as the numbers that go in, float32 `[patches, 3 * frames * patch * patch]`."""
        pixels = np.concatenate([self._frames(image.pixels) for image in images])
        return self.levels[torch.from_numpy(pixels).to(self.levels.device).int().add_(self.channels)]

    def _frames(self, pixels: Pixels) -> Pixels:
        n_patches, width = pixels.shape
        if width == len(self.channels):
            return pixels
        return pixels.reshape(n_patches, 3, -1).repeat(len(self.channels) // width, axis=1).reshape(n_patches, -1)

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
