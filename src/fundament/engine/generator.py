"""The thread that owns a model which writes: conversations come and go between its steps.

Each step is one forward pass over all conversations that run: those that write read their last token, those that were
let in since read on in their prompts, as much as a step has room for. Keys and values lie in memory while a
conversation runs; who finds no room waits.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fundament.core import Answer, Delta, Generate, Item, Writer
from fundament.engine.failures import device_lost
from fundament.engine.packing import share_step
from fundament.errors import ConversationTooLongError, FundamentError, RowError, UnavailableError
from fundament.telemetry import Metrics, say

MOST_WAITING = 64
"""Conversations that wait for room before others are refused."""


@dataclass(slots=True, eq=False)
class Conversation:
    """One answer on its way.

    Attributes:
        loop: the caller's event loop.
        call: what is asked.
        n_tokens: that it may take in memory, read and written.
        item: the conversation as it was read; let go once it has begun.
        deltas: what was written, or why nothing more is.
        cancelled: nobody waits any more.
        begun: whether anything was done for it.
    """

    loop: asyncio.AbstractEventLoop
    call: Generate
    n_tokens: int
    item: Item | None
    deltas: "asyncio.Queue[Delta | FundamentError]" = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    begun: bool = False
    answer: Answer | None = None

    @property
    def n_bytes(self) -> int:
        """What it takes while it waits: its pictures, mostly."""
        return sum(array.nbytes for array in self.item.features.values()) if self.item else 0

    async def next(self) -> Delta:
        """What is written next.

        Raises:
            FundamentError: the conversation failed.
        """
        delta = await self.deltas.get()
        if isinstance(delta, FundamentError):
            raise delta
        return delta


class Generator:
    """A model that writes, its conversations and its thread.

    Args:
        name: the model's id, for metrics and the thread's name.
        model: used by this thread only, but for `prepare`.
        set_up: called once by the thread.
        computing: the models of this engine that compute now, kept by the threads of each.
        deaths: those whose threads have died, and of what, likewise.
        max_step_tokens: most tokens of a step, where not more conversations write.
        cache_bytes: most that keys and values of all conversations take, and the pictures of those that wait.
        metrics: where steps are counted.
    """

    def __init__(
        self,
        name: str,
        model: Writer,
        *,
        set_up: Callable[[], None],
        computing: set[str],
        deaths: dict[str, BaseException],
        max_step_tokens: int,
        cache_bytes: int,
        metrics: Metrics,
    ) -> None:
        self.name, self.model = name, model
        self._deaths = deaths
        self._set_up, self._computing, self._max_step_tokens = set_up, computing, max_step_tokens
        self._cache_bytes, self._most_tokens = cache_bytes, cache_bytes // model.token_bytes
        self._waiting: deque[Conversation] = deque()
        self._running: list[Conversation] = []
        self._closing = False
        self._condition = threading.Condition()
        self._queue_seconds = metrics.queue_seconds.labels(name)
        self._forward_seconds = metrics.forward_seconds.labels(name)
        self._batch_rows, self._tokens = metrics.batch_rows.labels(name), metrics.tokens.labels(name)
        self._failed_rows = metrics.failed_rows.labels(name)
        self._thread = threading.Thread(target=self._live, name=f"{name}-0", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Conversations that have not begun."""
        return len(self._waiting)

    def submit(self, conversation: Conversation) -> None:
        """Queue a conversation. Any thread may call this.

        Raises:
            ConversationTooLongError: it finds no room however few others run.
            UnavailableError: too many wait, or the model's thread has died.
        """
        if conversation.n_tokens > self._most_tokens:
            n_prompt = conversation.item.n_counted if conversation.item else 0
            raise ConversationTooLongError(
                n_tokens=n_prompt, n_wanted=conversation.n_tokens - n_prompt, limit=self._most_tokens
            )
        with self._condition:
            if self._closing or self.name in self._deaths:
                why = self._deaths.get(self.name, "the server is closing")
                raise UnavailableError(f"Model '{self.name}' has stopped: {why}.")
            held = sum(each.n_bytes for each in (*self._waiting, conversation))
            if len(self._waiting) >= MOST_WAITING or (self._waiting and held > self._cache_bytes):
                raise UnavailableError(
                    f"Model '{self.name}' has as many conversations as it can hold, and {len(self._waiting)} wait. "
                    "Try again shortly.",
                    retry_after_seconds=5,
                )
            self._waiting.append(conversation)
            self._condition.notify()

    def drop(self, conversation: Conversation) -> None:
        """Forget a conversation that nobody waits for: its keys and values go before the next step."""
        with self._condition:
            conversation.cancelled = True
            if conversation in self._waiting:
                self._waiting.remove(conversation)

    def close(self, seconds: float | None = None) -> bool:
        """Finish what runs and waits, then end the thread; one that still runs after `seconds` is not waited for.

        Returns:
            Whether it has ended.
        """
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            self._set_up()
            while self._admit():
                self._step()
        except BaseException as error:
            say("model thread died", level=logging.CRITICAL, error=error, model=self.name)
            with self._condition:
                self._deaths[self.name] = error
                self._computing.discard(self.name)
                left, self._running = [*self._running, *self._waiting], []
                self._waiting.clear()
            for conversation in left:
                _tell(conversation, UnavailableError(f"Model '{self.name}' has stopped: {error!r}."))

    def _admit(self) -> bool:
        """Wait until something runs, and begin what there is room for, in the order of arrival; False at the end."""
        with self._condition:
            self._running = [each for each in self._running if not each.cancelled]
            while not self._running and not self._waiting:
                self._computing.discard(self.name)
                if self._closing:
                    return False
                self._condition.wait()
            self._computing.add(self.name)
            room = self._most_tokens - sum(each.n_tokens for each in self._running)
            begun = []
            while self._waiting and self._waiting[0].n_tokens <= room:
                room -= self._waiting[0].n_tokens
                begun.append(self._waiting.popleft())
            self._running += begun  # now, so that they are told if the thread dies while they begin
        for conversation in begun:
            self._begin(conversation)
        return True

    def _begin(self, conversation: Conversation) -> None:
        item, conversation.item = conversation.item, None
        assert item is not None
        self._queue_seconds.observe(time.monotonic() - conversation.arrived)
        conversation.begun = True
        try:
            conversation.answer = self.model.begin(conversation.call, item)
        except Exception as error:
            if device_lost(error):
                raise
            self._running.remove(conversation)
            self._fail(conversation, error)

    def _step(self) -> None:
        sizes = share_step([_ahead(each) for each in self._running], self._max_step_tokens)
        going = [(each, size) for each, size in zip(self._running, sizes, strict=True) if size]
        if going:
            self._run([each for each, _ in going], [size for _, size in going])

    def _run(self, conversations: Sequence[Conversation], sizes: Sequence[int]) -> None:
        """Take a step; on failure halve it, so that one bad conversation fails alone."""
        started = time.monotonic()
        deltas = self._attempt(conversations, sizes)
        if deltas is None:
            if middle := len(conversations) // 2:
                self._run(conversations[:middle], sizes[:middle])
                self._run(conversations[middle:], sizes[middle:])
            return
        self._forward_seconds.observe(time.monotonic() - started)
        self._batch_rows.observe(len(conversations))
        self._tokens.inc(sum(sizes))
        for conversation, delta in zip(conversations, deltas, strict=True):
            if delta is not None:
                if delta.finish:
                    self._running.remove(conversation)
                    conversation.answer = None
                _tell(conversation, delta)

    def _attempt(self, conversations: Sequence[Conversation], sizes: Sequence[int]) -> list[Delta | None] | None:
        """What each writes, if anything; None where the step failed, which is told to a conversation that is alone.

        The error ends in here, and with it the frames that hold the step's tensors: halves need that memory.
        """
        try:
            return self.model.step([each.answer for each in conversations], sizes)
        except Exception as error:
            if device_lost(error):
                raise
            if len(conversations) == 1:
                self._running.remove(conversations[0])
                self._fail(conversations[0], error)
            return None

    def _fail(self, conversation: Conversation, error: Exception) -> None:
        self._failed_rows.inc()
        say("conversation failed", level=logging.ERROR, error=error, model=self.name)
        conversation.answer = None
        _tell(conversation, RowError(f"The conversation failed in the model: {type(error).__name__}."))


def _ahead(conversation: Conversation) -> int:
    assert conversation.answer is not None
    return conversation.answer.n_ahead


def _tell(conversation: Conversation, news: Delta | FundamentError) -> None:
    try:
        conversation.loop.call_soon_threadsafe(conversation.deltas.put_nowait, news)
    except RuntimeError:  # the loop is closed: its callers are gone
        conversation.cancelled = True
