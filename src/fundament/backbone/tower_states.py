"""What towers made of pictures and sounds, kept for the rows that share them: in one batch or in several."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from fundament.core import Array

CAPACITY_BYTES = 64 * 1024**2

K = TypeVar("K")


class TowerStates(Generic[K]):
    """States by the array that they were made of, those used last, up to a number of bytes. Threads share it.

    An array is known by its identity and not held: what was made of it is of no use once the call that brought it is
    over. What is not here is computed again, so that results do not depend on what is.

    Args:
        capacity_bytes: most that all states take.
    """

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[K, tuple[weakref.ref[Array], Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, arrays: Mapping[K, Array], make: Callable[[Sequence[K]], Sequence[Tensor]]) -> dict[K, Tensor]:
        """The states of arrays.

        Args:
            arrays: by keys that differ where the states do, and no two of which are equal while both arrays live.
            make: the states of those that are not here, given their keys.
        """
        with self._lock:
            found = {key: states for key, array in arrays.items() if (states := self._find(key, array)) is not None}
        missing = [key for key in arrays if key not in found]
        made = dict(zip(missing, make(missing), strict=True)) if missing else {}
        with self._lock:
            for key in [key for key, (array, _) in self._kept.items() if array() is None]:
                self._drop(key)
            for key, states in (made | found).items():  # what was used before is likely to be used again: it goes last
                self._keep(key, arrays[key], states)
        return found | made

    def _find(self, key: K, array: Array) -> Tensor | None:
        held, states = self._kept.get(key, (None, None))
        return states if held is not None and held() is array else None

    def _keep(self, key: K, array: Array, states: Tensor) -> None:
        self._drop(key)
        if states.nbytes > self.capacity_bytes:
            return
        if states.untyped_storage().nbytes() > states.nbytes:
            states = states.clone()  # a view keeps all that it is part of
        while self.n_bytes + states.nbytes > self.capacity_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[key] = weakref.ref(array), states
        self.n_bytes += states.nbytes

    def _drop(self, key: K) -> None:
        if (gone := self._kept.pop(key, None)) is not None:
            self.n_bytes -= gone[1].nbytes
