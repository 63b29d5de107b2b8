"""The engine in this process."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast, overload
from weakref import WeakValueDictionary

import torch

from fundament.backbone.device import Dtype, Placement, place
from fundament.backbone.resources import free_bytes, n_cores, use_cores
from fundament.core import (
    Array,
    Bill,
    Call,
    Delta,
    Embed,
    Embedded,
    Generate,
    Item,
    Model,
    Priority,
    Ranking,
    Rerank,
    Result,
    Writer,
    sum_media,
)
from fundament.engine.batcher import Batcher, Ticket
from fundament.engine.generator import Conversation, Generator
from fundament.engine.loading import load_model, most_bytes
from fundament.engine.memory import Memory
from fundament.engine.recurring import Recurring, alike
from fundament.engine.weights import Local, embedded, verify_embedded
from fundament.errors import CheckpointError, ModelNotFoundError, UnavailableError
from fundament.telemetry import Metrics, say

_SIDE_BY_SIDE_BYTES = 256 * 1024**2
_MOST_THREADS = 4
_BATCH_TOKENS, _FEW_TOKENS = 512, 96
_FEW_ROWS = 64
_SHORT_CHARACTERS = 4096  # of a call that others wait for while it is tokenized

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How the engine uses the machine.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:1`.
        dtype: number format of the weights; `auto` is the fastest on this machine.
        n_threads: CPU cores in use; 0 means all.
        max_batch_tokens: most tokens of a batch; 0 means what `batch_tokens_of` and `few_tokens_of` say.
        max_waiting_rows: inputs that may wait for one model before calls are refused.
        max_waiting_bytes: memory of those inputs, likewise.
        memory_bytes: most that all models take; 0 means 80 % of what is free at start.
        idle_seconds: after which an unused model is let go; None keeps it.
        cache_bytes: what keys and values of a chat model's conversations may take, beside its weights.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    n_threads: int = 0
    max_batch_tokens: int = 0
    max_waiting_rows: int = 20_000
    max_waiting_bytes: int = 2_000_000_000
    memory_bytes: int = 0
    idle_seconds: float | None = None
    cache_bytes: int = 2_000_000_000


class Loaded:
    """A model in memory with its threads."""

    def __init__(self, model: Model[Any, Any] | Writer, batcher: Batcher | Generator, more_bytes: int = 0) -> None:
        self.model: Any = model
        self.batcher = batcher
        self.recurring = Recurring()
        self.n_bytes = model.n_bytes + more_bytes

    def close(self, seconds: float | None = None) -> None:
        """End the threads and drop the weights; threads that still run after `seconds` keep them."""
        ended = self.batcher.close(seconds)
        self.model = None
        if ended:
            del self.batcher.model
            with suppress(RuntimeError):  # of a GPU that is lost
                torch.cuda.empty_cache()  # its memory PyTorch would keep for itself


class LocalEngine:
    """Models in this process, each with its own threads.

    Args:
        locals_: the models that may be loaded, by id.
        options: how to use the machine.
        metrics: where work is counted.

    Attributes:
        loaded_once: the models that have been loaded, here now or let go again.
    """

    def __init__(self, locals_: Mapping[str, Local], options: EngineOptions, metrics: Metrics) -> None:
        self.locals = dict(locals_)
        self.options, self.metrics = options, metrics
        self.placement = place(options.device, options.dtype)
        self.n_cores = options.n_threads or n_cores()
        self.memory: Memory[Loaded] = Memory(
            budget_bytes=budget_of(options.memory_bytes, self.placement.device),
            idle_seconds=options.idle_seconds,
            measure=self._measure,
            load=self._load,
        )
        self.loaded_once: set[str] = set()
        self._computing: set[str] = set()
        self._deaths: dict[str, BaseException] = {}  # of what models have died, however long they stay
        self._n_readers = max(2, self.n_cores)
        self._working: set[Future[Any]] = set()  # what its threads do that may take long
        # OpenMP's threads stay with the thread that first needed them, and where a process has more than cores they
        # sleep after every operator. So none but the models' threads have any.
        alone = partial(use_cores, 1)
        self._pool = ThreadPoolExecutor(self._n_readers, thread_name_prefix="prepare", initializer=alone)
        # Apart from the others, so that no text waits for a video; few, because what they decode is large.
        self._n_decoders = max(2, self.n_cores // 2)
        self._decoders = ThreadPoolExecutor(self._n_decoders, thread_name_prefix="decode", initializer=alone)
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        metrics.gauge("fundament_rows_waiting", "Rows in the queue.", self._waiting)
        metrics.gauge("fundament_model_bytes", "Memory of each loaded model.", self._sizes)

    @overload
    async def run(
        self, model: str, call: Embed, *, priority: Priority = ..., caller: str = ..., bill: Bill | None = ...
    ) -> Embedded: ...
    @overload
    async def run(
        self, model: str, call: Rerank, *, priority: Priority = ..., caller: str = ..., bill: Bill | None = ...
    ) -> Ranking: ...
    async def run(
        self,
        model: str,
        call: Embed | Rerank,
        *,
        priority: Priority = Priority.INTERACTIVE,
        caller: str = "",
        bill: Bill | None = None,
    ) -> Result:
        """Answer a call: tokenize and decode on a worker thread, wait for the batches, put the arrays together.

        A call that fails costs nothing, one that is given up the rows that have run.

        Args:
            model: which one.
            call: what is asked.
            priority: the lane.
            caller: who asks: callers in one lane share the model's time.
            bill: who pays.

        Raises:
            FundamentError: the call cannot be read, may not be paid, or fails.
        """
        async with self._lease(model) as loaded:
            assert isinstance(loaded.batcher, Batcher)
            loop = asyncio.get_running_loop()
            done: asyncio.Future[list[Array]] = loop.create_future()
            ticket = Ticket(loop, done, caller)
            items = await self._read(loaded, call, caller)
            if bill is not None:
                await bill.admit(sum(item.n_counted for item in items))
            # Made here, since an engine that closes finishes what runs, and then lets go of the model.
            put_together: Callable[[Sequence[Array]], Result] = partial(finish, loaded.model, call, items)
            recurring = items[len(items) - call.n_recurring :] if isinstance(call, Embed) else []
            known = loaded.recurring.find(recurring)
            try:
                ticket.open(items, known)
                if not ticket.n_left:
                    ticket.resolve()
                elif len(items) <= _FEW_ROWS:  # less than a change of threads costs
                    loaded.batcher.submit(ticket, items, priority)
                else:
                    await self._work(partial(loaded.batcher.submit, ticket, items, priority))
                arrays = await done
                loaded.recurring.keep(recurring, arrays[len(items) - len(recurring) :], known)
                if isinstance(call, Embed) and call.output == "dense":  # one copy: less than a change of threads costs
                    return put_together(arrays)
                return await self._work(partial(put_together, arrays))
            except BaseException as error:
                loaded.batcher.drop(ticket)
                if bill is not None:
                    bill.refund(_unpaid(items, ticket, error))
                raise

    async def generate(
        self, model: str, call: Generate, *, caller: str = "", bill: Bill | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Answer a conversation, piece by piece.

        Conversations are let in as they come, whoever sends them. The tokens that one may have are taken before it
        runs, and those that it did not write are given back; one that fails costs nothing. Close the generator where it
        is not read to its end.

        Args:
            model: which one.
            call: what is asked.
            caller: who asks: callers share the time of those who decode.
            bill: who pays.

        Raises:
            FundamentError: the conversation cannot be read, may not be paid, or fails.
        """
        async with self._lease(model) as loaded:
            assert isinstance(loaded.batcher, Generator)
            prepare: Callable[[], Sequence[Item]] = partial(loaded.model.prepare, call)
            [item] = await (self._decode(prepare, caller) if call.has_media else self._work(prepare))
            n_taken, n_prompt, n_written, failed = item.n_tokens, item.n_counted, 0, False
            if bill is not None:
                await bill.admit(n_taken)
            conversation = Conversation(asyncio.get_running_loop(), replace(call, messages=()), n_taken, item)
            del item, call, prepare  # pictures are large
            try:
                loaded.batcher.submit(conversation)
                finished = False
                while not finished:
                    delta = await conversation.next()
                    n_written, finished = delta.n_written, delta.finish is not None
                    yield delta
            except Exception:
                failed = True
                raise
            finally:
                loaded.batcher.drop(conversation)
                if bill is not None:
                    bill.refund(n_taken - (n_prompt + n_written if conversation.begun and not failed else 0))

    async def _read(self, loaded: Loaded, call: Embed | Rerank, caller: str) -> Sequence[Item]:
        """The rows of a call; what waits for the model waits for those of a call that is read in no time."""
        assert isinstance(loaded.batcher, Batcher)
        prepare: Callable[[], Sequence[Item]] = partial(_rows, loaded.model, call)
        if call.has_media:
            return await self._decode(prepare, caller)
        if not _is_short(call):
            return await self._work(prepare)
        reading = asyncio.wrap_future(self._pool.submit(prepare))
        if len(self._working) >= self._n_readers:  # it waits for a thread itself
            return await reading
        with loaded.batcher.expecting():
            return await reading

    async def _decode(self, work: Callable[[], _Made], caller: str) -> _Made:
        """Read files on a thread of those who decode.

        A caller's wait for each other before they wait for a thread: other callers' pass by.
        """
        turn = self._turns.setdefault(caller, asyncio.Semaphore(self._n_decoders))
        await turn.acquire()
        decoding = self._decoders.submit(work)
        # A turn ends with the thread's work, which goes on for a caller who leaves.
        decoding.add_done_callback(partial(_later, asyncio.get_running_loop(), turn.release))
        return await asyncio.wrap_future(decoding)

    def _work(self, work: Callable[[], _Made]) -> asyncio.Future[_Made]:
        """Do what may take long on a thread that texts are read on.

        It counts until the thread is done, which a caller that leaves does not wait for.
        """
        working = self._pool.submit(work)
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        return asyncio.wrap_future(working)

    @asynccontextmanager
    async def _lease(self, model: str) -> AsyncIterator[Loaded]:
        """Hold a model for a caller, who is told whether it loads, and not what lies where on this machine.

        Raises:
            UnavailableError: it does not load; the log says why.
        """
        try:
            async with self.memory.lease(model) as loaded:
                yield loaded
        except CheckpointError as error:
            say("model did not load", level=logging.ERROR, model=model, reason=error.detail)
            raise UnavailableError(
                f"Model '{model}' cannot be loaded here; the server's log says why.",
                retry_after_seconds=60,
                is_final=True,
            ) from error

    async def load(self, model: str) -> None:
        """Load a model now.

        Raises:
            CheckpointError: it does not load; with all that is wrong with it.
            UnavailableError: it is larger than the memory of all models.
        """
        try:
            async with self.memory.lease(model):
                pass
        except CheckpointError as error:
            raise CheckpointError(f"Model '{model}' does not load: {error.detail}") from error

    def refresh(self, found: Mapping[str, Local]) -> None:
        """Offer models that came onto this machine while it runs; those that are offered already stay as they are."""
        self.locals = {**found, **self.locals}

    def deaths(self) -> dict[str, str]:
        """Models whose threads have died, and of what."""
        return {model: repr(error) for model, error in self._deaths.items()}

    async def close(self, seconds: float | None = None) -> None:
        """Finish what runs and let go of all models.

        A thread in the midst of a forward pass, a load or a text cannot be stopped: one that is still busy goes on.

        Args:
            seconds: that what runs may take; None waits however long.
        """
        await self.memory.close(seconds)
        for pool in (self._pool, self._decoders):
            pool.shutdown(wait=seconds is None)

    def _measure(self, model: str) -> int:
        local = self.locals.get(model)
        if local is None:
            raise ModelNotFoundError(f"Model '{model}' is not served here.")
        return most_bytes(local, self.placement, self.options.cache_bytes)

    async def _load(self, model: str) -> Loaded:
        # A thread of its own takes the OpenMP threads that the load needed with it.
        loader = ThreadPoolExecutor(1, "load", initializer=partial(use_cores, self.n_cores))
        made = loader.submit(self._load_now, self.locals[model])
        loader.shutdown(wait=False)
        try:
            loaded = await asyncio.wrap_future(made)
        except asyncio.CancelledError:
            made.add_done_callback(_end)
            raise
        self.loaded_once.add(model)
        return loaded

    def _load_now(self, local: Local) -> Loaded:
        if local == embedded():
            verify_embedded(local)
        name, on_cpu = local.spec.id, self.placement.device.type == "cpu"
        model = load_model(local, self.placement)
        n_threads = threads_of(model.n_bytes, self.n_cores) if on_cpu else 1
        self.metrics.loads.labels(name).inc()
        say("model loaded", model=name, device=str(self.placement.device), dtype=self.placement.dtype_name)
        max_tokens = self.options.max_batch_tokens or batch_tokens_of(model.n_bytes, on_cpu=on_cpu)
        few = few_tokens_of(self.placement, self.n_cores)
        if local.spec.kind == "chat":
            generator = Generator(
                name,
                cast("Writer", model),
                set_up=partial(use_cores, self.n_cores),
                computing=self._computing,
                deaths=self._deaths,
                max_step_tokens=max_tokens,
                cache_bytes=self.options.cache_bytes,
                metrics=self.metrics,
            )
            return Loaded(model, generator, self.options.cache_bytes)
        return Loaded(
            model,
            Batcher(
                name,
                model,
                n_threads=n_threads,
                n_cores=self.n_cores,
                computing=self._computing,
                deaths=self._deaths,
                max_batch_tokens=max_tokens,
                few_tokens=min(few, self.options.max_batch_tokens or few),
                max_waiting_rows=self.options.max_waiting_rows,
                max_waiting_bytes=self.options.max_waiting_bytes,
                rescue=None if self.placement.dtype == torch.float32 else partial(_in_float32, local),
                metrics=self.metrics,
            ),
        )

    def _waiting(self) -> Sequence[tuple[str, float]]:
        return [(model, loaded.batcher.n_waiting) for model, loaded in self.memory.loaded.items()]

    def _sizes(self) -> Sequence[tuple[str, float]]:
        return [(model, loaded.n_bytes) for model, loaded in self.memory.loaded.items()]


def _end(made: Future[Loaded]) -> None:
    """End the threads of a model that nobody waited for: one that starts while the interpreter ends can abort it."""
    if not made.cancelled() and made.exception() is None:
        made.result().close()


def _later(loop: asyncio.AbstractEventLoop, work: Callable[[], None], _: Future[Any]) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(work)


def budget_of(memory_bytes: int, device: torch.device) -> int:
    """Most memory of all models together: as the operator says, else 80 % of what is free now."""
    return memory_bytes or int(0.8 * free_bytes(device))


def threads_of(n_bytes: int, n_cores: int) -> int:
    """How many batches of a model run side by side on a CPU, the cores divided among them.

    Small layers do not divide well over cores, whole batches do (`benchmarks/engine.py --threads`). Four at most: the
    threads share one interpreter.
    """
    return min(n_cores, _MOST_THREADS) if n_bytes <= _SIDE_BY_SIDE_BYTES else 1


def batch_tokens_of(n_bytes: int, *, on_cpu: bool) -> int:
    """Most tokens of a batch: on a CPU few, since a query behind a long call waits for the batch that runs.

    A large model's are more, because every batch reads all of its weights (`benchmarks/engine.py --budget`).
    """
    if not on_cpu:
        return 16_384
    return _BATCH_TOKENS if n_bytes <= _SIDE_BY_SIDE_BYTES else 2 * _BATCH_TOKENS


def few_tokens_of(placement: Placement, n_cores: int) -> int:
    """So few tokens go through a small model together on a CPU, though other threads are free.

    On two cores one thread on both of them is faster than two on one each, for as many tokens as two batches hold. On
    more cores it leaves some idle, but in bfloat16 operators on a few tokens are so short that threads side by side
    wait for each other and for the interpreter between them (`benchmarks/server.py --only crowd`).
    """
    if n_cores == 2:
        return 2 * _BATCH_TOKENS
    return _FEW_TOKENS if placement.dtype == torch.bfloat16 else 0


def _rows(model: Model[Any, Any], call: Embed | Rerank) -> Sequence[Item]:
    """A call's rows; those of texts that read alike are one, which runs once and counts each time."""
    items = cast("Sequence[Item]", model.prepare(call))
    if len(items) == 1 or not isinstance(call, Embed):
        return items
    first: dict[Hashable, Item] = {}
    return [
        item if item.n_media else first.setdefault((alike(item), item.n_counted, item.n_truncated), item)
        for item in items
    ]


def _is_short(call: Embed | Rerank) -> bool:
    """Whether a call of texts alone has few of them, and short ones."""
    sent = call.inputs if isinstance(call, Embed) else (call.query, *call.documents)
    return len(sent) <= _FEW_ROWS and sum(len(text) for text in sent if isinstance(text, str)) <= _SHORT_CHARACTERS


def _unpaid(items: Sequence[Item], ticket: Ticket, error: BaseException) -> int:
    """Tokens to give back: all of a call that failed, those of rows that have not run where the caller left."""
    left = isinstance(error, asyncio.CancelledError)
    rows = zip(items, ticket.rows, strict=True)
    return sum(item.n_counted for item, row in rows if row not in ticket.arrays or not left)


def finish(model: Model[Any, Any], call: Call, items: Sequence[Item], arrays: Sequence[Array]) -> Result:
    """What a model makes of a call's arrays, with what was read of its rows."""
    made: Result = model.finish(call, items, arrays)
    # A PDF is as many rows as it has pages, and late chunking reads several inputs in one.
    told_apart = isinstance(call, Embed) and not call.late_chunking and len(items) == len(call.inputs)
    return replace(
        made,
        n_tokens=sum(item.n_counted for item in items),
        n_truncated=sum(item.n_truncated for item in items),
        n_media=sum_media(item.n_media for item in items),
        n_tokens_each=[item.n_counted for item in items] if told_apart else (),
        n_media_each=[item.n_media for item in items] if told_apart else (),
    )


def _in_float32(local: Local, items: Sequence[Item]) -> list[Array]:
    model = load_model(local, Placement(torch.device("cpu"), torch.float32))
    return [model.forward([item])[0] for item in items]
