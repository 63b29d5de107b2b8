"""From items to packed rows, and from what the rows became back to the items' order."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from fundament.backbone.packed import BASE, Packed, pack, rounded
from fundament.core import Item

T = TypeVar("T")


def pack_items(
    items: Sequence[Item], device: torch.device, *, fit: Callable[[int], int] = rounded
) -> tuple[Packed, list[int]]:
    """Lay rows end to end, those of an adapter side by side and of them those of like length.

    Args:
        items: with their token ids as the feature `ids`, and where they ask for one the place of an adapter, `adapter`.
        device: where the batch goes.
        fit: as `pack` takes it.

    Returns:
        The batch, and of each of its rows the place in `items`.
    """
    rows = [item.features["ids"] for item in items]
    adapters = [int(item.features.get("adapter", BASE)) for item in items]
    order = sorted(range(len(rows)), key=lambda place: (adapters[place], len(rows[place])))
    packed = pack([rows[place] for place in order], device, [adapters[place] for place in order], fit=fit)
    return packed, order


def unsort(found: Iterable[T], order: Sequence[int]) -> list[T]:
    """What the rows of a batch became, in the items' order; `order` is what `pack_items` gave beside the batch."""
    placed = dict(zip(order, found, strict=True))
    return [placed[place] for place in range(len(order))]
