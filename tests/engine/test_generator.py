"""The thread of a model that writes: who is let in, who fails, who is told; with a model of this file's own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fundament.core import Delta, Generate, Item
from fundament.engine.generator import MOST_WAITING, Conversation, Generator
from fundament.engine.packing import share_step
from fundament.errors import ConversationTooLongError, RowError, UnavailableError
from fundament.telemetry import Metrics
from tests.engine.device_errors import device_error
from tests.served import PATIENCE_SECONDS


@dataclass
class Count:
    """An answer that counts."""

    n_ahead: int
    most: int
    bad: bool
    n: int = 0


class Counter:
    """Writes numbers; a step waits until it may go on."""

    n_bytes, token_bytes = 0, 10

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.steps: list[list[int]] = []

    def prepare(self, call: Generate) -> list[Item]:
        return []

    def begin(self, call: Generate, item: Item) -> Count:
        return Count(item.n_counted, item.n_tokens - item.n_counted, bad=call.seed == 13)

    def step(self, answers: Sequence[Count], sizes: Sequence[int]) -> list[Delta | None]:
        assert self.gate.wait(PATIENCE_SECONDS)
        if any(answer.bad for answer in answers):
            raise ValueError
        self.steps.append(list(sizes))
        return [self._next(answer, size) for answer, size in zip(answers, sizes, strict=True)]

    def _next(self, answer: Count, size: int) -> Delta | None:
        answer.n_ahead -= size
        if answer.n_ahead:
            return None
        answer.n_ahead, answer.n = 1, answer.n + 1
        finish = "stop" if answer.n == answer.most else None
        return Delta(text=str(answer.n), n_prompt=0, n_written=answer.n, finish=finish)  # type: ignore[arg-type]


@contextmanager
def running(model: Counter, cache_bytes: int = 1_000) -> Iterator[Generator]:
    generator = Generator(
        "counter",
        model,
        set_up=lambda: None,
        computing=set(),
        deaths={},
        max_step_tokens=8,
        cache_bytes=cache_bytes,
        metrics=Metrics(),
    )
    try:
        yield generator
    finally:
        model.gate.set()
        generator.close()


def ask(n_prompt: int, most: int, *, bad: bool = False, n_bytes: int = 0) -> Conversation:
    features = {"pixels": np.zeros(n_bytes, np.uint8)}
    item = Item(features=features, n_tokens=n_prompt + most, n_counted=n_prompt)
    call = Generate(messages=[], seed=13 if bad else None)
    return Conversation(asyncio.get_running_loop(), call, item.n_tokens, item)


async def hear(conversation: Conversation) -> AsyncIterator[str]:
    while True:
        delta = await conversation.next()
        yield delta.text
        if delta.finish:
            return


async def whole(conversation: Conversation) -> str:
    return " ".join([text async for text in hear(conversation)])


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), PATIENCE_SECONDS))


async def until(happened: Callable[[], object]) -> None:
    while not happened():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("ahead", "budget", "sizes"),
    [
        ([], 8, []),
        ([1, 1, 1], 2, [1, 1, 1]),
        ([20], 8, [8]),
        ([1, 20, 5], 8, [1, 7, 0]),
        ([3, 1, 9], 8, [3, 1, 4]),
        ([1, 1, 9], 2, [1, 1, 1]),
    ],
)
def test_a_step_is_shared_and_nobody_stands_still(ahead: list[int], budget: int, sizes: list[int]) -> None:
    assert share_step(ahead, budget) == sizes


def test_those_who_come_later_join_those_who_write() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model) as generator:
            model.gate.clear()
            first, second = ask(3, 4), ask(20, 2)
            generator.submit(first)
            await until(lambda: first.begun)
            generator.submit(second)
            model.gate.set()
            assert await asyncio.gather(whole(first), whole(second)) == ["1 2 3 4", "1 2"]
        assert model.steps[0] == [3]
        assert model.steps[1] == [1, 7]
        assert model.steps[-1] == [1]

    play(scene)


def test_it_says_while_it_computes() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model) as generator:
            assert not generator._computing
            model.gate.clear()
            generator.submit(conversation := ask(3, 2))
            await until(lambda: generator._computing == {"counter"})
            model.gate.set()
            assert await whole(conversation) == "1 2"
            await until(lambda: not generator._computing)

    play(scene)


def test_who_finds_no_room_waits_and_who_never_would_is_refused() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model, cache_bytes=100) as generator:
            with pytest.raises(ConversationTooLongError, match="has 8 tokens and its answer should have room for 3"):
                generator.submit(ask(8, 3))
            model.gate.clear()
            first, second = ask(4, 4), ask(4, 2)
            generator.submit(first)
            generator.submit(second)
            await until(lambda: first.begun)
            assert generator.n_waiting == 1
            for _ in range(MOST_WAITING - 1):
                generator.submit(ask(1, 1))
            with pytest.raises(UnavailableError, match="Try again shortly"):
                generator.submit(ask(1, 1))
            model.gate.set()
            assert await whole(second) == "1 2"

    play(scene)


def test_pictures_of_those_who_wait_have_a_bounded_memory() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model, cache_bytes=100) as generator:
            model.gate.clear()
            first, large, small = ask(4, 6), ask(1, 1, n_bytes=101), ask(1, 1, n_bytes=60)
            generator.submit(first)
            await until(lambda: first.begun)
            generator.submit(large)  # nobody waits
            with pytest.raises(UnavailableError, match="and 1 wait"):
                generator.submit(small)
            generator.drop(large)
            generator.submit(small)
            with pytest.raises(UnavailableError, match="and 1 wait"):
                generator.submit(ask(1, 1, n_bytes=41))
            generator.submit(ask(1, 1, n_bytes=40))
            model.gate.set()
            assert await whole(small) == "1"

    play(scene)


def test_one_that_fails_fails_alone() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model) as generator:
            model.gate.clear()
            conversations = [ask(2, 3), ask(2, 3, bad=True), ask(2, 3)]
            for conversation in conversations:
                generator.submit(conversation)
            model.gate.set()
            assert await whole(conversations[0]) == await whole(conversations[2]) == "1 2 3"
            with pytest.raises(RowError, match="ValueError"):
                await conversations[1].next()
            assert conversations[1].answer is None

    play(scene)


def test_one_that_is_dropped_makes_room() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model, cache_bytes=100) as generator:
            model.gate.clear()
            first, second, third = ask(4, 6), ask(4, 6), ask(4, 2)
            for conversation in (first, second, third):
                generator.submit(conversation)
            await until(lambda: first.begun)
            generator.drop(first)
            generator.drop(second)
            model.gate.set()
            assert await whole(third) == "1 2"
            assert not second.begun

    play(scene)


def test_closing_lets_those_who_are_there_finish() -> None:
    async def scene() -> None:
        model = Counter()
        with running(model, cache_bytes=100) as generator:
            conversations = [ask(4, 5), ask(4, 3)]
            for conversation in conversations:
                generator.submit(conversation)
            await asyncio.to_thread(generator.close)
            assert [await whole(each) for each in conversations] == ["1 2 3 4 5", "1 2 3"]
            with pytest.raises(UnavailableError, match="the server is closing"):
                generator.submit(ask(1, 1))

    play(scene)


@pytest.mark.parametrize("part", ["begin", "step"])
@pytest.mark.parametrize("error", [SystemExit(), device_error(700)])
def test_a_thread_that_dies_tells_everybody(part: str, error: BaseException) -> None:
    async def scene() -> None:
        model = Counter()

        def die(*_: object) -> None:
            raise error

        setattr(model, part, die)
        with running(model) as generator:
            conversation = ask(2, 2)
            generator.submit(conversation)
            with pytest.raises(UnavailableError, match="has stopped"):
                await conversation.next()
            assert generator._deaths == {"counter": error}
            assert not generator._computing

    play(scene)
