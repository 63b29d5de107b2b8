"""Beginnings that rows share: the keys and values of every layer that they leave behind, kept for the next row."""

import threading
from collections import OrderedDict

from torch import Tensor

from fundament.core import Array


class Prefixes:
    """Keys and values of token prefixes, those used last, up to a number of bytes. Threads share it.

    A prefix's tensor is `[layers, 2, tokens, kv_heads, head_dim]`, keys first. What is not here is computed again, so
    that results do not depend on what is.

    Args:
        capacity_bytes: most that all of them take.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, prefix: Array) -> Tensor | None:
        """The keys and values of a prefix, if they are still here."""
        with self._lock:
            found = self._kept.get(key := prefix.tobytes())
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, prefix: Array, states: Tensor) -> None:
        """Keep a prefix's keys and values; those that have not been used for longest make room."""
        if states.nbytes > self.capacity_bytes:
            return
        with self._lock:
            if (old := self._kept.pop(key := prefix.tobytes(), None)) is not None:
                self.n_bytes -= old.nbytes
            while self.n_bytes + states.nbytes > self.capacity_bytes:
                self.n_bytes -= self._kept.popitem(last=False)[1].nbytes
            self._kept[key] = states
            self.n_bytes += states.nbytes
