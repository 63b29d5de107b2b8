"""What rows became that come again call after call: the labels of a classification, above all."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

from fundament.core import Array, Item

CAPACITY_BYTES = 16 * 1024**2


class Recurring:
    """Arrays by the features of their rows, those used last, up to a number of bytes. One thread uses it.

    It belongs to a loaded model and goes with it, so that nothing here was made by other weights.

    Args:
        capacity_bytes: most that all arrays take.
    """

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[Hashable, Array] = OrderedDict()

    def find(self, items: Sequence[Item]) -> dict[int, Array]:
        """The arrays of those items that are here, by the identity of the item."""
        found = {}
        for item in items:
            if (array := self._kept.get(key := alike(item))) is not None:
                self._kept.move_to_end(key)
                found[id(item)] = array
        return found

    def keep(self, items: Sequence[Item], arrays: Sequence[Array], known: Mapping[int, Array]) -> None:
        """Keep what `find` did not have; what has not been used for longest makes room."""
        for item, array in zip(items, arrays, strict=True):
            if id(item) in known or array.nbytes > self.capacity_bytes or (key := alike(item)) in self._kept:
                continue
            self._kept[key] = array.copy()  # a row of a batch's result would keep all of it
            self.n_bytes += array.nbytes
            while self.n_bytes > self.capacity_bytes:
                self.n_bytes -= self._kept.popitem(last=False)[1].nbytes


def alike(item: Item) -> Hashable:
    """What is equal of rows that become the same."""
    return item.mate, *((name, array.tobytes()) for name, array in sorted(item.features.items()))
