"""Which waiting rows go next: a pure function, so that policy is tested without threads."""

from collections.abc import Hashable, Sequence
from typing import Protocol

from fundament.core import Priority

AGEING_SECONDS = 2.0
"""A background row that has waited this much longer than an interactive one goes before it."""


class Waiting(Protocol):
    """What the policy knows of a waiting row."""

    @property
    def n_tokens(self) -> int:
        """Tokens that it costs."""
        ...

    @property
    def mate(self) -> Hashable:
        """Rows share a batch only where this is equal."""
        ...

    @property
    def priority(self) -> Priority:
        """Its lane."""
        ...

    @property
    def arrived(self) -> float:
        """When it came, in seconds of a steady clock."""
        ...


def rank(row: Waiting) -> float:
    """The order in which rows lead a batch: by arrival, a background row as if it had come `AGEING_SECONDS` later."""
    return row.arrived + row.priority * AGEING_SECONDS


def take_batch(rows: Sequence[Waiting], budget: int) -> list[int]:
    """Choose the next batch.

    The row of the least `rank` always goes, however long it is. Others with the same `mate` join, interactive before
    background, those nearest to its length first, while the batch stays within the budget.

    Args:
        rows: what waits.
        budget: most tokens of the batch.

    Returns:
        Places in `rows`, the leading row first; empty where nothing waits.
    """
    if not rows:
        return []
    lead = min(range(len(rows)), key=lambda place: (rank(rows[place]), place))
    first = rows[lead]
    room = budget - first.n_tokens
    mates = [place for place, row in enumerate(rows) if place != lead and row.mate == first.mate]
    mates.sort(key=lambda place: (rows[place].priority, abs(rows[place].n_tokens - first.n_tokens)))
    batch = [lead]
    for place in mates:
        if rows[place].n_tokens <= room:
            room -= rows[place].n_tokens
            batch.append(place)
    return batch
