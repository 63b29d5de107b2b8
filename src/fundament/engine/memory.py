"""Which models stay in memory: loaded once, leased while in use, evicted when room is needed or nobody came."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from fundament.errors import UnavailableError
from fundament.telemetry import say


class Resident(Protocol):
    """Something that takes memory and can be let go."""

    @property
    def n_bytes(self) -> int:
        """What it takes."""
        ...

    def close(self, seconds: float | None = None) -> None:
        """Let go of it; blocks until its threads have ended, or for that long."""
        ...


R = TypeVar("R", bound=Resident)


@dataclass(slots=True)
class _Seat(Generic[R]):
    """A model in memory, or on its way there."""

    n_bytes: int
    ready: "asyncio.Task[R]"
    n_leases: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def loaded(self) -> bool:
        """Whether it can answer now."""
        return self.ready.done() and not self.ready.cancelled() and self.ready.exception() is None


@dataclass(frozen=True, slots=True)
class Use:
    """What the policy knows of a loaded model."""

    n_bytes: int
    n_leases: int
    last_used: float


def to_drain(uses: Mapping[str, Use], needed_bytes: int, budget_bytes: int) -> set[str]:
    """The models whose work must end so that `needed_bytes` fit the budget, those without any first."""
    taken, drained = sum(use.n_bytes for use in uses.values()), set()
    for model, use in sorted(uses.items(), key=lambda pair: (pair[1].n_leases > 0, pair[1].last_used)):
        if taken + needed_bytes <= budget_bytes:
            break
        drained.add(model)
        taken -= use.n_bytes
    return drained


def to_evict(uses: Mapping[str, Use], needed_bytes: int, budget_bytes: int) -> list[str] | None:
    """The models to let go, least recently used first, so that `needed_bytes` fit the budget.

    Returns:
        Their ids, possibly none; None where models with work in flight leave no room.
    """
    taken = sum(use.n_bytes for use in uses.values())
    evicted = []
    for model, use in sorted(uses.items(), key=lambda pair: pair[1].last_used):
        if taken + needed_bytes <= budget_bytes:
            break
        if use.n_leases == 0:
            evicted.append(model)
            taken -= use.n_bytes
    return evicted if taken + needed_bytes <= budget_bytes else None


class Memory(Generic[R]):
    """The models in memory. Lives on one event loop.

    Args:
        budget_bytes: most that all models take together.
        idle_seconds: after which an unused model is let go; None keeps it.
        measure: what a model will take, in bytes, before it is loaded.
        load: loads a model; awaited once however many callers wait for it.
    """

    def __init__(
        self,
        *,
        budget_bytes: int,
        idle_seconds: float | None,
        measure: Callable[[str], int],
        load: Callable[[str], Awaitable[R]],
    ) -> None:
        self.budget_bytes, self.idle_seconds = budget_bytes, idle_seconds
        self._measure, self._load = measure, load
        self._seats: dict[str, _Seat[R]] = {}
        self._door = asyncio.Lock()  # held while somebody waits for room
        self._draining: set[str] = set()  # no new work for these meanwhile: nobody overtakes, so nobody starves
        self._freed = asyncio.Event()
        self._closed = False

    @property
    def loaded(self) -> dict[str, R]:
        """The models that can answer now."""
        return {model: seat.ready.result() for model, seat in self._seats.items() if seat.loaded}

    @asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[R]:
        """Hold a model in memory while in use; the first lease loads it.

        Raises:
            UnavailableError: it is larger than the whole budget, or everything is closed.
            FundamentError: it does not load; the next lease tries again.
        """
        seat = None if model in self._draining else self._seats.get(model)
        if seat is None:
            async with self._door:
                seat = self._seats.get(model) or await self._sit(model)
                seat.n_leases += 1
        else:
            seat.n_leases += 1
        try:
            # Shielded: one caller who leaves does not end the load that others wait for.
            yield seat.ready.result() if seat.loaded else await asyncio.shield(seat.ready)
        finally:
            seat.n_leases -= 1
            seat.last_used = time.monotonic()
            self._freed.set()

    async def expire(self) -> None:
        """Let go of models that nobody used for `idle_seconds`; runs until cancelled."""
        if self.idle_seconds is None:
            return
        while True:
            await asyncio.sleep(min(self.idle_seconds / 4, 10.0))
            await self._let_go_unused_since(time.monotonic() - self.idle_seconds)

    async def _let_go_unused_since(self, limit: float) -> None:
        # In a frame of its own, which ends: a name that is still bound while nothing happens would keep the last model.
        for model, seat in list(self._seats.items()):
            async with self._door:  # nobody finds room before its memory is free
                still_here = self._seats.get(model) is seat  # it may have gone while another was let go
                if still_here and seat.loaded and seat.n_leases == 0 and seat.last_used < limit:
                    del self._seats[model]
                    say("model let go after idling", model=model)
                    await asyncio.to_thread(seat.ready.result().close)

    async def close(self, seconds: float | None = None) -> None:
        """Let go of everything for good, after the work that runs, or after `seconds` in the midst of it."""
        seats, self._seats, self._closed = self._seats, {}, True
        self._freed.set()
        deadline = time.monotonic() + (seconds or 0)
        for seat in seats.values():
            if seat.loaded:
                left = None if seconds is None else max(0.0, deadline - time.monotonic())
                await asyncio.to_thread(seat.ready.result().close, left)
            else:
                seat.ready.cancel()

    async def _sit(self, model: str) -> _Seat[R]:
        needed = await asyncio.to_thread(self._measure, model)  # reads files
        if needed > self.budget_bytes:
            raise UnavailableError(
                f"Model '{model}' needs {_size(needed)} of memory, the budget is {_size(self.budget_bytes)}. "
                "Raise --memory-gb, or serve a smaller model.",
                retry_after_seconds=60,
                is_final=True,
            )
        evicted = await self._room(needed)
        if self._closed:
            raise UnavailableError(f"Model '{model}' has stopped: the server is closing.")
        gone = [self._seats.pop(name) for name in evicted]
        for name in evicted:
            say("model evicted", model=name, room_for=model)
        seat = _Seat(needed, asyncio.ensure_future(self._fill(model, gone)))
        seat.ready.add_done_callback(lambda task: self._seated(model, task))
        self._seats[model] = seat
        return seat

    async def _room(self, needed: int) -> list[str]:
        """Wait until so many bytes have room; the models to let go for it."""
        try:
            while (evicted := to_evict(self._uses(), needed, self.budget_bytes)) is None:
                kept = sum(use.n_bytes for name, use in self._uses().items() if name not in self._draining)
                if kept + needed > self.budget_bytes:  # added to only: a set that changed could always let somebody in
                    self._draining |= to_drain(self._uses(), needed, self.budget_bytes)
                self._freed.clear()
                await self._freed.wait()
            return evicted
        finally:
            self._draining = set()

    def _uses(self) -> dict[str, Use]:
        # A model that is still loading counts as in use.
        return {
            name: Use(seat.n_bytes, seat.n_leases + (not seat.ready.done()), seat.last_used)
            for name, seat in self._seats.items()
        }

    async def _fill(self, model: str, gone: list[_Seat[R]]) -> R:
        for seat in gone:
            await asyncio.to_thread(seat.ready.result().close)
            seat.ready = None  # type: ignore[assignment]  # drops the last reference before the load begins
        return await self._load(model)

    def _seated(self, model: str, task: "asyncio.Task[R]") -> None:
        seat = self._seats.get(model)
        if seat is not None and seat.ready is task:
            if task.cancelled() or task.exception() is not None:
                del self._seats[model]
            else:
                seat.n_bytes = max(seat.n_bytes, task.result().n_bytes)
        self._freed.set()


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
