"""Which waiting rows go next: pure functions, so that policy is tested without threads.

Two lanes: interactive rows go first, and a background row goes at the latest `AGEING_SECONDS` after its turn. Within a
lane callers share the model's time, whatever each of them has sent: start-time fair queueing (Goyal et al., 1996) with
the clock of weighted fair queueing (Demers et al., 1989), so that nothing need be kept of callers who are gone.
"""

from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Protocol

from fundament.core import Priority

AGEING_SECONDS = 2.0


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


def dues(clock: float, n_tokens: Sequence[int], n_calls: int) -> list[float]:
    """The places of a call's rows in their lane: the lower, the sooner.

    A row's place is what the caller would have been given before it, were all callers served at once. So the rows of a
    long call are spread over the tokens to come, and calls that arrive later go between them; single rows of different
    callers go as they come, and the more calls one caller has, the slower each of them is.

    Args:
        clock: of the lane.
        n_tokens: what each row costs.
        n_calls: calls of this caller that wait, this one included.
    """
    first = clock + (n_calls - 1) * sum(n_tokens[:1])
    return [first + n_calls * before for before in accumulate(n_tokens[:-1], initial=0)]


def advanced(clock: float, n_tokens: int, n_callers: int, led: float) -> float:
    """A lane's clock as a batch begins: what each of its callers has been given, or the place of the row that leads.

    By the places alone it would stand still while single rows of many callers come one after the other, and a row
    behind that place would never go.

    Args:
        clock: as the batch before it began.
        n_tokens: what that batch took.
        n_callers: those with calls in the lane.
        led: the place of the row that leads.
    """
    return max(led, clock + n_tokens / max(1, n_callers))


def turn(priority: Priority, arrived: float, led: float) -> float:
    """When a lane's turn is: the lane with the earliest leads the next batch.

    Args:
        priority: the lane.
        arrived: when its first row came, in seconds of a steady clock.
        led: when the lane last led a batch.
    """
    return max(arrived, led) + priority * AGEING_SECONDS


def take_batch(rows: Sequence[Waiting], budget: int) -> list[int]:
    """Choose the next batch.

    The first row always goes, however long it is. Others with the same `mate` join, those nearest to its length first,
    while the batch stays within the budget. Background rows do not make an interactive batch longer.

    Args:
        rows: what waits, the most urgent first.
        budget: most tokens of the batch.

    Returns:
        Places in `rows`, the leading row first; empty where nothing waits.
    """
    if not rows:
        return []
    first = rows[0]
    room = budget - first.n_tokens
    mates = [
        place for place, row in enumerate(rows) if place and row.mate == first.mate and row.priority <= first.priority
    ]
    mates.sort(key=lambda place: (rows[place].priority, abs(rows[place].n_tokens - first.n_tokens)))
    batch = [0]
    for place in mates:
        if rows[place].n_tokens <= room:
            room -= rows[place].n_tokens
            batch.append(place)
    return batch


def share(n_waiting: int, n_free: int, *, n_busy: int, n_alone: int, few: int, most: int) -> int:
    """How many of the tokens that wait a free thread takes.

    Threads that are free together divide what waits, so that one large call uses all cores. A few tokens stay together,
    and wait for a batch that runs alone where they are few with it: their callers then ask together again. Where they
    are not, one group would stand still whenever the other runs.

    Args:
        n_waiting: tokens that wait.
        n_free: threads without a batch.
        n_busy: threads with one.
        n_alone: tokens of a batch of few that runs alone; 0 where none does.
        few: so many tokens stay together; where no other batch runs, though they are more than `most`.
        most: most tokens of a batch that is not alone.

    Returns:
        Tokens; 0 where they should wait.
    """
    if not n_free or (n_alone and n_alone + n_waiting <= few):
        return 0
    if n_waiting > few:
        return min(most, -(-n_waiting // n_free))
    return min(most, n_waiting) if n_busy else n_waiting


def share_step(ahead: Sequence[int], budget: int) -> list[int]:
    """How many tokens each conversation reads in a step.

    Those that write read one. What is left goes to those that still read, in their order, and at least one token to
    the first of them, so that nothing stands still.

    Args:
        ahead: tokens that each has before it; 1 while it writes.
        budget: most tokens of the step, where fewer than this many write.
    """
    sizes = [1 if n == 1 else 0 for n in ahead]
    room = max(1, budget - sum(sizes))
    for place, n in enumerate(ahead):
        if n > 1:
            sizes[place] = min(n, room)
            room -= sizes[place]
    return sizes
