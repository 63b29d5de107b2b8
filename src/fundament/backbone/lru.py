"""What was made once, kept by a key for those who ask for it again: what was used last, up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRU(Generic[K, V]):
    """Values by key, those used last, up to a number of bytes. Threads share it.

    What is not here is computed again, so that results do not depend on what is.

    Args:
        capacity_bytes: most that all values take.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value of a key, if it is still here."""
        with self._lock:
            if (kept := self._kept.get(key)) is None:
                return None
            self._kept.move_to_end(key)
            return kept[0]

    def put(self, key: K, value: V, n_bytes: int) -> None:
        """Keep a value of so many bytes; those that have not been used for longest make room."""
        with self._lock:
            self._drop(key)
            if n_bytes > self.capacity_bytes:
                return
            while self.n_bytes + n_bytes > self.capacity_bytes:
                self._drop(next(iter(self._kept)))
            self._kept[key] = value, n_bytes
            self.n_bytes += n_bytes

    def drop(self, unwanted: Callable[[V], bool]) -> None:
        """Let go of values that are no longer wanted."""
        with self._lock:
            for key in [key for key, (value, _) in self._kept.items() if unwanted(value)]:
                self._drop(key)

    def _drop(self, key: K) -> None:
        _, n_bytes = self._kept.pop(key, (None, 0))
        self.n_bytes -= n_bytes
