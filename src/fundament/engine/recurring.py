"""What rows became that come again call after call: the labels of a classification, above all."""

from collections.abc import Hashable, Mapping, Sequence

from fundament.backbone.lru import LRU
from fundament.core import Array, Item

CAPACITY_BYTES = 16 * 1024**2


class Recurring(LRU[Hashable, Array]):
    """Arrays by the features of their rows.

    It belongs to a loaded model and goes with it, so that nothing here was made by other weights.
    """

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        super().__init__(capacity_bytes)

    def find(self, items: Sequence[Item]) -> dict[int, Array]:
        """The arrays of those items that are here, by the identity of the item."""
        return {id(item): array for item in items if (array := self.get(alike(item))) is not None}

    def keep(self, items: Sequence[Item], arrays: Sequence[Array], known: Mapping[int, Array]) -> None:
        """Keep what `find` did not have."""
        for item, array in zip(items, arrays, strict=True):
            if id(item) not in known:
                n_bytes = array.nbytes + sum(each.nbytes for each in item.features.values())  # the key holds those
                self.put(alike(item), array.copy(), n_bytes)  # a row of a batch's result would keep all of it


def alike(item: Item) -> Hashable:
    """What is equal of rows that become the same."""
    return item.mate, *((name, array.tobytes()) for name, array in sorted(item.features.items()))
