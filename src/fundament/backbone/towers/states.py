"""What towers made of pictures and sounds, kept for the rows that share them: in one batch or in several."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from fundament.backbone.lru import LRU
from fundament.core import Array

CAPACITY_BYTES = 64 * 1024**2

K = TypeVar("K")


class TowerStates(LRU[K, tuple[weakref.ref[Array], Tensor]]):
    """States by the array that they were made of.

    An array is known by its identity and not held: what was made of it is of no use once the call that brought it is
    over.
    """

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        super().__init__(capacity_bytes)

    def look(self, arrays: Mapping[K, Array], make: Callable[[Sequence[K]], Sequence[Tensor]]) -> dict[K, Tensor]:
        """The states of arrays.

        Args:
            arrays: by keys that differ where the states do, and no two of which are equal while both arrays live.
            make: the states of those that are not here, given their keys.
        """
        found = {key: states for key, array in arrays.items() if (states := self._find(key, array)) is not None}
        missing = [key for key in arrays if key not in found]
        made = dict(zip(missing, make(missing), strict=True)) if missing else {}
        self.drop(lambda kept: kept[0]() is None)
        for key, states in (made | found).items():  # what was used before is likely to be used again: it goes last
            if states.untyped_storage().nbytes() > states.nbytes <= self.capacity_bytes:
                states = states.clone()  # a view keeps all that it is part of
            self.put(key, (weakref.ref(arrays[key]), states), states.nbytes)
        return found | made

    def _find(self, key: K, array: Array) -> Tensor | None:
        held, states = self.get(key) or (None, None)
        return states if held is not None and held() is array else None
