"""Pictures in tiles: a thumbnail of the whole, and squares that overlap, cut from the picture at a larger size.

Molmo's way (Deitke et al. 2024, appendix A), as jina-vlm reads it. A crop is a square of patches. Cells of a few
patches become a token each; of two tiles that overlap, each gives the cells that are farther from its edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.checkpoint import Config
from fundament.backbone.towers.images import Pixels, check_form, fitting_size
from fundament.core import Array
from fundament.errors import CheckpointError

PATCH, COLUMN, START, STOP = range(4)
"""What a token of a picture stands for: a cell, the end of a line, the beginning and the end of a grid."""

# What a `preprocessor_config.json` must say or leave out, and what the publishers' processor does where it is left out.
_SERVED = {
    "cropping_method": ("overlap-and-resize", "resize"),
    "normalization_method": ("minmax", "gaussian"),
    "image_min": (-1.0, -1.0),
    "image_max": (1.0, 1.0),
    "antialias": (True, True),
    "random_interpolation": (False, False),
    "preserve_aspect_ratio": (False, False),
    "resize_in_float32": (True, True),
    "use_column_tokens": (True, True),
    "do_resize": (True, True),
}


@dataclass(frozen=True, slots=True)
class Crops:
    """A picture cut up.

    Attributes:
        pixels: float32 `[crops, patches, patch * patch * 3]` from -1 to 1, the thumbnail first; a patch is its pixels
            line by line, each with its three channels.
        rows: tiles from top to bottom.
        columns: tiles from left to right.
    """

    pixels: Array
    rows: int
    columns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How pictures are cut.

    Attributes:
        side: height and width of a crop, in pixels.
        patch: height and width of a patch, in pixels.
        margin: patches at each edge of a crop that it shares with its neighbours.
        cell: height and width of a cell, in patches.
        most: tiles of a picture.
        least_pixels: of a picture before it is cut.
        most_pixels: of a picture before it is cut.
        filter: how pictures are resized.
    """

    side: int
    patch: int
    margin: int
    cell: int
    most: int
    least_pixels: int
    most_pixels: int
    filter: Literal["bicubic", "bilinear"]

    @property
    def patches(self) -> int:
        """Patches of a crop's side."""
        return self.side // self.patch

    @property
    def cells(self) -> int:
        """Cells of a crop's side; the last may reach over the edge."""
        return -(-self.patches // self.cell)

    @property
    def step(self) -> int:
        """Pixels from one tile to the next."""
        return self.side - 2 * self.margin * self.patch

    @property
    def step_cells(self) -> int:
        """Cells from one tile's first to the next one's."""
        return -(-(self.patches - 2 * self.margin) // self.cell)

    def cut(self, picture: Pixels, field: str) -> Crops:
        """A picture as the tower reads it.

        Raises:
            InputError: it is hardly more than a line.
        """
        check_form(picture, field)
        rows, columns, fitted = self._plan(picture)
        channels = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
        # One by one: in float32 a large picture takes a gigabyte.
        image = torch.cat([self._resize(channel[None, None].float().div_(255), *fitted) for channel in channels], dim=1)
        large = self._resize(image, *(number * self.step + self.side - self.step for number in (rows, columns)))
        small = self._resize(image, self.side, self.side)
        tiles = large.unfold(2, self.side, self.step).unfold(3, self.side, self.step)  # [1, 3, rows, columns, y, x]
        crops = torch.cat((small, tiles[0].flatten(1, 2).transpose(0, 1)))
        squares = crops.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # [n, 3, row, y, column, x]
        pixels = squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return Crops((pixels * 2 - 1).contiguous().numpy(), rows, columns)

    def count(self, picture: Pixels, field: str) -> int:
        """Tokens of a picture, before it is cut.

        Raises:
            InputError: it is hardly more than a line.
        """
        check_form(picture, field)
        rows, columns, _ = self._plan(picture)
        return len(self.marks(rows, columns))

    def marks(self, rows: int, columns: int) -> Array:
        """What each token of a picture stands for, int64 `[tokens]`: first the thumbnail's, then those of all tiles."""
        return np.concatenate(
            [
                [START, *([PATCH] * wide + [COLUMN]) * tall, STOP]
                for tall, wide in ((self.cells, self.cells), self._grid(rows, columns))
            ]
        ).astype(np.int64)

    def places(self, rows: int, columns: int) -> Array:
        """Which token each cell of each crop becomes, int64 `[crops * cells * cells]`; -1 for none."""
        inside = np.arange(self.cells)
        thumbnail = 1 + inside[:, None] * (self.cells + 1) + inside
        start = self.cells * (self.cells + 1) + 3
        width = self._grid(rows, columns)[1] + 1
        down, right = (self._lines(number) for number in (rows, columns))
        tiles = start + down[:, None, :, None] * width + right[None, :, None, :]
        kept = (down[:, None, :, None] >= 0) & (right[None, :, None, :] >= 0)
        return np.concatenate([thumbnail.ravel(), np.where(kept, tiles, -1).ravel()])

    def _grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Lines and columns of cells of all tiles together."""
        tall, wide = ((number - 1) * self.step_cells + self.cells for number in (rows, columns))
        return tall, wide

    def _lines(self, number: int) -> Array:
        """The line, or column, of the whole in which each of the tiles' cells lies, `[tiles, cells]`; -1 for none."""
        tile, cell = np.indices((number, self.cells))
        edge = self.margin // self.cell
        given = ((tile == 0) | (cell >= edge)) & ((tile == number - 1) | (cell < edge + self.step_cells))
        return np.where(given, tile * self.step_cells + cell, -1)

    def _plan(self, picture: Pixels) -> tuple[int, int, tuple[int, int]]:
        """Rows and columns of tiles, and the height and width that the picture has before it is cut."""
        height, width = picture.shape[:2]
        fitted = fitting_size(height, width, factor=self.patch, least=self.least_pixels, most=self.most_pixels)
        margins = self.side - self.step
        rows, columns = tiling(fitted[0] - margins, fitted[1] - margins, self.step, self.most)
        return rows, columns, fitted

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        if image.shape[2:] == (height, width):
            return image
        return F.interpolate(image, (height, width), mode=self.filter, align_corners=False, antialias=True).clamp_(0, 1)


def tiling(height: int, width: int, step: int, most: int) -> tuple[int, int]:
    """Rows and columns of the tiles that need the least enlargement, or else the least reduction.

    Args:
        height: of the picture without margins, in pixels; zero or less where it is smaller than those.
        width: as `height`.
        step: pixels of a tile without margins.
        most: tiles in all.
    """
    pairs = [(a, b) for a in range(1, most + 1) for b in range(1, most // a + 1)]
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair[0]))  # of equals, the first is chosen
    with np.errstate(divide="ignore"):
        scales = (np.array(pairs, dtype=np.float32) * step / np.array([height, width], dtype=np.float32)).min(axis=1)
    chosen = scales.argmax() if (scales < 1).all() else np.where(scales < 1, np.inf, scales).argmin()
    return pairs[int(chosen)]


def read_tiles(told: Config) -> Tiles:
    """How a `preprocessor_config.json` of jina-vlm's says that pictures are cut.

    Raises:
        CheckpointError: a way that is not served.
    """
    asked = {key: told.get(key, usual) for key, (_, usual) in _SERVED.items()}
    if others := {key: value for key, value in asked.items() if value != _SERVED[key][0]}:
        raise CheckpointError(f"{told.where} asks for image processing that is not served: {others}")
    height, width = _both(told.get("base_input_size", 336))
    before, after = _both(told.get("overlap_margins", 4))
    cells = {told.get("pooling_h", 2), told.get("pooling_w", 2)}
    tiles = Tiles(
        side=height,
        patch=told.get("patch_size", 14),
        margin=before,
        cell=max(cells),
        most=told.get("max_crops", 6),
        least_pixels=told.get("min_pixels") or 3_136,
        most_pixels=told.get("max_pixels") or 1_003_520,
        filter=told.get("interpolation", "bicubic"),
    )
    lengths = {told.get("token_length_h", 12), told.get("token_length_w", 12)}
    if (
        height != width
        or before != after
        or len(cells) != 1
        or lengths != {tiles.cells}
        or before % tiles.cell
        or height % tiles.patch
        or tiles.step <= 0
    ):
        raise CheckpointError(f"{told.where}: crops, margins, cells and token lengths do not go together: {tiles}")
    if tiles.filter not in ("bicubic", "bilinear"):
        raise CheckpointError(f"{told.where}: interpolation '{tiles.filter}' is not served")
    return tiles


def _both(told: int | Sequence[int]) -> tuple[int, int]:
    first, second = (told, told) if isinstance(told, int) else told
    return first, second
