"""The threads that own a model: rows of many callers wait here and go through it together.

There is no timer. A thread that is free takes the next batch as soon as no rows are on their way that could share it,
and few rows once a batch of few is done; while all are busy, rows gather.
"""

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import attrgetter
from typing import Any

import numpy as np

from fundament.backbone.resources import keep_to, start_helpers, use_cores
from fundament.core import Array, Item, Model, Priority
from fundament.engine.failures import device_lost, out_of_memory
from fundament.engine.packing import advanced, dues, share, take_batch, turn
from fundament.errors import RowError, UnavailableError
from fundament.telemetry import Metrics, say

_WINDOW = 512  # waiting rows that the policy looks at, so that a long queue costs no more than a short one
_COMPANY_TOKENS = 512  # so many wait for no others, where they are more than few
_MOST_IN_VAIN = 4  # so many calls may come to nothing, and what waits waits for no others
_CLEAN_BATCHES = 100  # so many full ones show that memory which was short is there again

Rescue = Callable[[Sequence[Item]], list[Array]]
"""Runs rows again in float32, each alone."""


@dataclass(slots=True)
class Ticket:
    """One call's rows on their way through the model.

    Attributes:
        loop: the caller's event loop.
        done: resolved there with `arrays`, or with the first error.
        caller: who waits.
        lane: where it counts among its caller's calls; None where it does not, or not any more.
        cancelled: set when nobody waits any more; rows that have not started are then dropped.
        rows: of each of the call's items, the row that it is: an item that is there twice is one row.
        arrays: one per row, filled as batches finish.
        n_left: rows without an array yet.
        error: the first failure of a row.
    """

    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Array]]
    caller: str = ""
    lane: Priority | None = None
    cancelled: bool = False
    rows: list[int] = field(default_factory=list)
    arrays: dict[int, Array] = field(default_factory=dict)
    n_left: int = 0
    error: Exception | None = None

    @property
    def flow(self) -> Hashable:
        """Whom it shares the model's time as: its caller, or itself where nobody is named."""
        return self.caller or id(self)

    def open(self, items: Sequence[Item], known: Mapping[int, Array] | None = None) -> None:
        """Expect an array for each item. A row's number is the place of the first item that it stands for.

        Args:
            items: of the call.
            known: arrays of rows that need not run, by the identity of the item.
        """
        first: dict[int, int] = {}
        self.rows = [first.setdefault(id(item), place) for place, item in enumerate(items)]
        self.arrays = {first[item]: array for item, array in (known or {}).items()}
        self.n_left = len(first) - len(self.arrays)

    def resolve(self) -> None:
        """Wake the caller; runs on its event loop."""
        if self.done.done():
            return
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result([self.arrays[row] for row in self.rows])


@dataclass(slots=True)
class Row:
    """One waiting row of a ticket."""

    ticket: Ticket
    place: int
    item: Item
    priority: Priority
    arrived: float
    due: float
    n_bytes: int

    @property
    def n_tokens(self) -> int:
        """Tokens that it costs."""
        return self.item.n_tokens

    @property
    def mate(self) -> Hashable:
        """What it may share a batch with."""
        return self.item.mate


class Batcher:
    """A model, its waiting rows and its threads.

    Args:
        name: the model's id, for metrics and thread names.
        model: used by these threads only.
        n_threads: how many batches run side by side.
        n_cores: CPU cores that they divide among them.
        computing: the models of this engine that compute now, kept by the threads of each.
        deaths: those whose threads have died, and of what, likewise.
        max_batch_tokens: most tokens of a batch, but for one of few that is alone; fewer while memory is short.
        few_tokens: so many stay together in one thread, though others are free.
        max_waiting_rows: rows past which a call is refused; a call into an empty queue is always taken.
        max_waiting_bytes: the same of the rows' memory.
        rescue: runs rows whose results are not finite again in float32; None where that is what ran.
        metrics: where batches are counted.
    """

    def __init__(
        self,
        name: str,
        model: Model[Any, Any],
        *,
        n_threads: int,
        n_cores: int,
        computing: set[str],
        deaths: dict[str, BaseException],
        max_batch_tokens: int,
        few_tokens: int,
        max_waiting_rows: int,
        max_waiting_bytes: int,
        rescue: Rescue | None,
        metrics: Metrics,
    ) -> None:
        self.name, self.model = name, model
        self.max_batch_tokens = max_batch_tokens
        self._deaths = deaths
        self._few_tokens, self._computing = few_tokens, computing
        self._most_tokens, self._n_clean = (max_batch_tokens, few_tokens), 0
        self._n_cores = max(1, n_cores // n_threads)
        # What few tokens that are alone divide over, in the first thread: a second core, where threads have one each.
        self._n_cores_alone = 2 if few_tokens and n_threads > 1 and self._n_cores == 1 else self._n_cores
        self._max_waiting_rows, self._max_waiting_bytes = max_waiting_rows, max_waiting_bytes
        self._rescue = rescue
        self._lanes: dict[Priority, list[Row]] = {priority: [] for priority in Priority}  # each in the order of `due`
        self._led = dict.fromkeys(Priority, 0.0)
        self._clock, self._n_taken = dict.fromkeys(Priority, 0.0), dict.fromkeys(Priority, 0)
        self._n_calls: dict[Priority, Counter[Hashable]] = {priority: Counter() for priority in Priority}
        self._n_waiting_tokens, self._n_waiting_bytes, self._closing = 0, 0, False
        self._n_expected, self._n_in_vain = 0, 0  # calls that are being read; that have been since a row came
        self._most_waiting = 0  # the most tokens that have waited since the last batch
        self._n_busy, self._n_alone = 0, 0  # the second: tokens of a batch of few that runs alone
        self._tokens_per_second = 0.0
        self._lock = threading.RLock()
        self._idle: dict[int, threading.Condition] = {}  # of each thread that waits, by its number
        self._queue_seconds = metrics.queue_seconds.labels(name)
        self._forward_seconds = metrics.forward_seconds.labels(name)
        self._batch_fill, self._batch_rows = metrics.batch_fill.labels(name), metrics.batch_rows.labels(name)
        self._tokens, self._failed_rows = metrics.tokens.labels(name), metrics.failed_rows.labels(name)
        self._threads = [
            threading.Thread(target=self._live, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def n_waiting(self) -> int:
        """Rows in the queue."""
        return sum(len(lane) for lane in self._lanes.values())

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Let what waits wait for the rows of a call that is read until the block ends, which must be soon.

        Callers whose answers come together send their next requests together. Without this the first of them would go
        through the model alone, and the others wait for it. Calls that come to nothing, one after the other, hold
        nobody up for long.
        """
        with self._lock:
            self._n_expected += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_expected -= 1
                self._n_in_vain += 1
                self._wake()

    def submit(self, ticket: Ticket, items: Sequence[Item], priority: Priority) -> None:
        """Queue the rows of a call whose ticket is open. Any thread may call this.

        Raises:
            UnavailableError: the queue is full, or the model's threads have died.
        """
        now = time.monotonic()
        different = [place for place in dict.fromkeys(ticket.rows) if place not in ticket.arrays]
        sizes = _sizes([items[place] for place in different])
        n_bytes = sum(sizes)
        with self._lock:
            if self._closing or self.name in self._deaths:
                why = self._deaths.get(self.name, "the server is closing")
                raise UnavailableError(f"Model '{self.name}' has stopped: {why}.")
            n_waiting = self.n_waiting
            crowded = n_waiting + len(different) > self._max_waiting_rows
            if n_waiting and (crowded or self._n_waiting_bytes + n_bytes > self._max_waiting_bytes):
                raise UnavailableError(
                    f"The queue of model '{self.name}' is full ({n_waiting} inputs wait). Try again shortly.",
                    retry_after_seconds=self._seconds_to_drain(),
                )
            if ticket.cancelled:
                return
            ticket.lane, n_calls = priority, self._n_calls[priority]
            n_calls[ticket.flow] += 1
            costs = [items[place].n_tokens for place in different]
            places = dues(self._clock[priority], costs, n_calls[ticket.flow])
            lane = self._lanes[priority]
            lane += [
                Row(ticket, place, items[place], priority, now, due, size)
                for place, due, size in zip(different, places, sizes, strict=True)
            ]
            lane.sort(key=attrgetter("due"))
            n_tokens = sum(costs)
            self._n_waiting_tokens += n_tokens
            self._n_waiting_bytes += n_bytes
            if self._n_waiting_tokens > self._most_waiting:
                self._most_waiting, self._n_in_vain = self._n_waiting_tokens, 0
            self._wake()

    def _wake(self) -> None:
        """Wake a thread for what waits, the first that is idle; the lock is held."""
        if self._idle and self.n_waiting and self._share():
            self._idle[min(self._idle)].notify()

    def _share(self) -> int:
        """How many of the tokens that wait a thread should take; 0 where they should wait."""
        few, most = self._few_tokens, self.max_batch_tokens
        if self._computing - {self.name}:  # no second core is free
            few = min(few, most)
        awaited = self._n_expected and self._n_in_vain < _MOST_IN_VAIN
        if awaited and self._n_waiting_tokens < max(_COMPANY_TOKENS, few) and not self._closing:
            return 0
        return share(
            self._n_waiting_tokens,
            len(self._threads) - self._n_busy,
            n_busy=self._n_busy,
            n_alone=self._n_alone,
            few=few,
            most=most,
        )

    def drop(self, ticket: Ticket) -> None:
        """Forget a call that nobody waits for any more: its waiting rows cost nothing. Any thread may call this."""
        with self._lock:
            ticket.cancelled = True
            if ticket.lane is not None:
                self._leave(ticket)
                for priority, lane in self._lanes.items():
                    self._uncount([row for row in lane if row.ticket is ticket])
                    self._lanes[priority] = [row for row in lane if row.ticket is not ticket]

    def close(self, seconds: float | None = None) -> bool:
        """Finish what runs and waits, then end the threads; those that still run after `seconds` are not waited for.

        Returns:
            Whether all have ended.
        """
        with self._lock:
            self._closing = True
            for condition in self._idle.values():
                condition.notify()
        deadline = time.monotonic() + (seconds or 0)
        for thread in self._threads:
            thread.join(None if seconds is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _seconds_to_drain(self) -> int:
        return max(1, min(60, round(self._n_waiting_tokens / (self._tokens_per_second or 1e9))))

    def _live(self, number: int) -> None:
        helped = number == 0 and self._n_cores_alone > self._n_cores
        rows: list[Row] = []
        try:
            own, cores = start_helpers(self._n_cores_alone) if helped else (set(), set())
            use_cores(self._n_cores)
            divides = False
            for rows, alone in self._batches(number):
                if helped and divides != (alone and self._computing == {self.name}):
                    divides = not divides
                    use_cores(self._n_cores_alone if divides else self._n_cores)
                    keep_to(own if divides else cores)
                self._run(rows)
                rows = []  # while it waits, a thread keeps nothing of its last batch
        except BaseException as error:
            self._die(error, rows)

    def _die(self, error: BaseException, running: Sequence[Row]) -> None:
        say("model thread died", level=logging.CRITICAL, error=error, model=self.name)
        with self._lock:
            self._deaths[self.name] = error
            self._computing.discard(self.name)
            unsettled = [row for row in running if row.place not in row.ticket.arrays]
            rows = [*unsettled, *(row for lane in self._lanes.values() for row in lane)]
            for lane in self._lanes.values():
                lane.clear()
        failure = UnavailableError(f"Model '{self.name}' has stopped: {error!r}.")
        self._settle([(row, failure) for row in rows])

    def _batches(self, number: int) -> Iterator[tuple[list[Row], bool]]:
        """Wait for rows and hand out batches until the end, to one of the threads, and whether each runs alone."""
        condition = threading.Condition(self._lock)
        while True:
            with self._lock:
                while not (rows := self._take()):
                    if self._closing:
                        return
                    self._idle[number] = condition
                    condition.wait()
                    del self._idle[number]
                n_tokens = sum(row.n_tokens for row in rows)
                alone = not self._n_busy and not self.n_waiting and n_tokens <= self._few_tokens
                self._n_busy += 1
                self._computing.add(self.name)
                if alone:
                    self._n_alone = n_tokens
                self._wake()  # another thread, for the rest
            yield rows, alone
            with self._lock:
                self._n_busy -= 1
                if not self._n_busy:
                    self._computing.discard(self.name)
                if alone:
                    self._n_alone = 0

    def _take(self) -> list[Row]:
        """A batch of the most urgent rows; an empty one where nothing waits, or what waits should wait on."""
        if not (lanes := self._turns()) or not (budget := self._share()):
            return []
        window = list(islice(chain.from_iterable(self._lanes[priority] for priority in lanes), _WINDOW))
        places = take_batch(window, budget)
        if budget > self.max_batch_tokens and len(places) < self.n_waiting:  # not alone: the rest runs beside it
            places = take_batch(window, self.max_batch_tokens)
        taken = [window[place] for place in places]
        gone = set(map(id, taken))
        for priority in lanes:
            head = self._lanes[priority][: len(window)]
            self._lanes[priority][: len(window)] = [row for row in head if id(row) not in gone]
        self._uncount(taken)
        self._most_waiting = 0
        self._advance(taken)
        return taken

    def _advance(self, taken: Sequence[Row]) -> None:
        """Note in their lanes whose turn it was, and what is taken."""
        first = taken[0]
        self._led[first.priority] = time.monotonic()
        for priority in {row.priority for row in taken}:
            before, n_callers = self._n_taken[priority], len(self._n_calls[priority])
            led = first.due if priority is first.priority else 0.0
            self._clock[priority] = advanced(self._clock[priority], before, n_callers, led)
            self._n_taken[priority] = sum(row.n_tokens for row in taken if row.priority is priority)

    def _turns(self) -> list[Priority]:
        """The lanes where rows wait, the next one first."""
        return sorted(
            (priority for priority, lane in self._lanes.items() if lane),
            key=lambda priority: turn(priority, self._lanes[priority][0].arrived, self._led[priority]),
        )

    def _uncount(self, rows: Sequence[Row]) -> None:
        """Count rows no longer among those that wait."""
        self._n_waiting_tokens -= sum(row.n_tokens for row in rows)
        self._n_waiting_bytes -= sum(row.n_bytes for row in rows)

    def _leave(self, ticket: Ticket) -> None:
        """Count a call no longer among its caller's."""
        if ticket.lane is not None:
            n_calls, ticket.lane = self._n_calls[ticket.lane], None
            n_calls[ticket.flow] -= 1
            if not n_calls[ticket.flow]:
                del n_calls[ticket.flow]

    def _run(self, rows: list[Row]) -> None:
        """Run a batch; on failure halve it, so that one bad row fails only its own call."""
        started = time.monotonic()
        arrays = self._forward(rows)
        if arrays is not None:
            self._count(rows, started, time.monotonic() - started)
            self._settle(self._finite(rows, arrays))
        elif len(rows) > 1:
            middle = len(rows) // 2
            self._run(rows[:middle])
            self._run(rows[middle:])

    def _forward(self, rows: Sequence[Row]) -> list[Array] | None:
        """An array for each row; None where the batch failed, which is told.

        The error ends in here, and with it the frames that hold the batch's tensors: halves need that memory. One that
        costs the device ends the thread.
        """
        try:
            return self.model.forward([row.item for row in rows])
        except Exception as error:
            if device_lost(error):
                raise
            if len(rows) == 1:
                self._failed_rows.inc()
                say("row failed", level=logging.ERROR, error=error, model=self.name)
                failure = RowError(f"Input {rows[0].place} failed in the model: {type(error).__name__}.")
                self._settle([(rows[0], failure)])
            elif out_of_memory(error):
                half = max(1, sum(row.n_tokens for row in rows) // 2)
                with self._lock:
                    self.max_batch_tokens = min(self.max_batch_tokens, half)
                    self._few_tokens = min(self._few_tokens, self.max_batch_tokens)
                    self._n_clean = 0
                say(
                    "out of memory: smaller batches",
                    level=logging.WARNING,
                    model=self.name,
                    max_batch_tokens=self.max_batch_tokens,
                )
            return None

    def _finite(self, rows: Sequence[Row], arrays: Sequence[Array]) -> list[tuple[Row, Array | Exception]]:
        """Each row's array; where it is not finite that of the row alone, or in float32, or an error that names it.

        Alone first, because a row that is not finite can spoil its neighbours in the batch. In float32 all of them at
        once, because that loads the model again.
        """
        results: list[Array | Exception] = list(arrays)
        wrong = _not_finite(arrays)
        for place in wrong:
            row = rows[place]
            say("row not finite", level=logging.WARNING, model=self.name, place=row.place, tokens=row.n_tokens)
        for again in (self._alone, self._rescue):
            if not wrong or again is None:
                continue
            try:
                found = again([rows[place].item for place in wrong])
            except Exception as error:
                say("row failed", level=logging.ERROR, error=error, model=self.name)
                continue
            for place, array in zip(wrong, found, strict=True):
                results[place] = array
            wrong = [wrong[place] for place in _not_finite(found)]
        for place in wrong:
            self._failed_rows.inc()
            results[place] = RowError(f"Input {rows[place].place} gives a vector that is not finite.")
        return list(zip(rows, results, strict=True))

    def _alone(self, items: Sequence[Item]) -> list[Array]:
        return [self.model.forward([item])[0] for item in items]

    def _count(self, rows: list[Row], started: float, seconds: float) -> None:
        n_tokens = sum(row.n_tokens for row in rows)
        self._tokens.inc(n_tokens)
        self._forward_seconds.observe(seconds)
        self._batch_rows.observe(len(rows))
        self._batch_fill.observe(min(1.0, n_tokens / self.max_batch_tokens))
        self._queue_seconds.observe(started - min(row.arrived for row in rows))
        rate = n_tokens / max(seconds, 1e-9)
        self._tokens_per_second += 0.2 * (rate - self._tokens_per_second)
        if (self.max_batch_tokens, self._few_tokens) != self._most_tokens and 2 * n_tokens > self.max_batch_tokens:
            self._widen()

    def _widen(self) -> None:
        """Let batches grow again after many full ones: another process may have had the memory that was short."""
        with self._lock:
            self._n_clean += 1
            if self._n_clean == _CLEAN_BATCHES:
                most, few = self._most_tokens
                self.max_batch_tokens = min(most, 2 * self.max_batch_tokens)
                self._few_tokens, self._n_clean = min(few, 2 * self._few_tokens), 0

    def _settle(self, results: Iterable[tuple[Row, Array | Exception]]) -> None:
        """Hand results to their tickets and wake the callers whose last row this was, one wake-up per event loop."""
        finished: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        with self._lock:
            for row, result in results:
                ticket = row.ticket
                ticket.n_left -= 1
                if isinstance(result, Exception):
                    ticket.error = ticket.error or result
                    self.drop(ticket)
                else:
                    ticket.arrays[row.place] = result
                    if not ticket.n_left:
                        self._leave(ticket)
                if ticket.error is not None or not ticket.n_left:  # of a failed call again and again: no harm
                    finished.setdefault(ticket.loop, []).append(ticket)
        for loop, tickets in finished.items():
            try:
                loop.call_soon_threadsafe(_resolve, tickets)
            except RuntimeError:  # the loop is closed: its callers are gone
                continue


def _sizes(items: Sequence[Item]) -> list[int]:
    """Memory that the features of each row take; what several share, as a picture, counts with the first."""
    seen: set[int] = set()
    sizes = []
    for item in items:
        own = {id(array): array.nbytes for array in item.features.values() if id(array) not in seen}
        seen |= own.keys()
        sizes.append(sum(own.values()))
    return sizes


def _not_finite(arrays: Sequence[Array]) -> list[int]:
    """The places of arrays with a number that is not finite."""
    return [place for place, array in enumerate(arrays) if not np.isfinite(array).all()]


def _resolve(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.resolve()
