"""Positions with three coordinates (M-RoPE, Wang et al. 2024, section 2.1): time, row and column.

A text token has the same number three times. A picture's tokens share one time and count rows and columns from there;
what follows continues after the largest of all. Texts alone so get the rotations of plain positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.positions import Rotation, rotation_by
from fundament.core import Array


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a picture's tokens lie in a row: `rows * columns` of them from `start` on, line by line."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        """One past the last."""
        return self.start + self.rows * self.columns


def positions(n_tokens: int, slots: Sequence[Slot]) -> Array:
    """Time, row and column of each token, int64 `[3, n_tokens]`; slots come in their order."""
    found = np.empty((3, n_tokens), dtype=np.int64)
    place, following = 0, 0
    for slot in slots:
        found[:, place : slot.start] = following + np.arange(slot.start - place)
        following += slot.start - place
        inside = np.indices((1, slot.rows, slot.columns)).reshape(3, -1)
        found[:, slot.start : slot.stop] = following + inside
        following += max(slot.rows, slot.columns)
        place = slot.stop
    found[:, place:] = following + np.arange(n_tokens - place)
    return found


def mrope_rotation(
    places: Tensor, sections: Sequence[int], head_dim: int, theta: float, dtype: torch.dtype
) -> Rotation:
    """Rotations by three coordinates.

    Args:
        places: time, row and column of each token, `[3, tokens]`.
        sections: how many frequencies turn by each of the three, the quickest by time; half of `head_dim` together.
        head_dim: numbers of a head.
        theta: the base of the frequencies.
        dtype: of the result; angles are float32.
    """
    exponents = torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float32) / head_dim
    by = torch.from_numpy(np.repeat(np.arange(3), sections)).to(places.device)
    return rotation_by(places[by].T.float() * theta**-exponents, dtype)
