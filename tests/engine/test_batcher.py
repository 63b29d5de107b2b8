"""The threads that own a model: order, failure, cancellation, the bounded queue."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch

from fundament.core import Array, Call, Item, Priority, Result
from fundament.engine.batcher import Batcher, Ticket
from fundament.errors import RowError, UnavailableError
from fundament.telemetry import Metrics
from tests.engine.device_errors import device_error

N_ROUNDS = 20  # of what a thread could do too soon


class Doubler:
    """A model that doubles a number, slowly where a gate is shut, and fails where it is told to."""

    n_bytes = 0

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.fails: Callable[[list[int]], BaseException | None] = lambda _: None

    def prepare(self, call: Call) -> list[Item]:
        raise NotImplementedError

    def finish(self, call: Call, items: Sequence[Item], arrays: Sequence[Array]) -> Result:
        raise NotImplementedError

    def forward(self, items: Sequence[Item]) -> list[Array]:
        numbers = [int(item.features["n"]) for item in items]
        self.batches.append(numbers)
        assert self.gate.wait(10)
        if error := self.fails(numbers):
            raise error
        return [np.array([2.0 * number]) for number in numbers]


@pytest.fixture
def model() -> Doubler:
    return Doubler()


def started(model: Doubler, **options: object) -> Batcher:
    defaults: dict[str, object] = {
        "n_threads": 1,
        "n_cores": 1,
        "computing": set(),
        "deaths": {},
        "max_batch_tokens": 1000,
        "few_tokens": 96,
        "max_waiting_rows": 100,
        "max_waiting_bytes": 10**9,
        "rescue": None,
        "metrics": Metrics(),
    }
    return Batcher("doubler", model, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.fixture
def batcher(model: Doubler) -> Iterator[Batcher]:
    batcher = started(model)
    yield batcher
    model.gate.set()
    batcher.close()


def items(*numbers: int, n_tokens: int = 10) -> list[Item]:
    return [Item(features={"n": np.array(number)}, n_tokens=n_tokens) for number in numbers]


def opened(rows: list[Item], caller: str = "") -> Ticket:
    loop = asyncio.get_running_loop()
    ticket = Ticket(loop, loop.create_future(), caller)
    ticket.open(rows)
    return ticket


def submit(batcher: Batcher, rows: list[Item], priority: Priority = Priority.INTERACTIVE, caller: str = "") -> Ticket:
    ticket = opened(rows, caller)
    batcher.submit(ticket, rows, priority)
    return ticket


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def others_turn() -> None:
    """Leave the processor to the model's threads, which take it where they have something to do."""
    await asyncio.to_thread(lambda: None)


def test_results_come_in_the_order_of_the_rows(runner: asyncio.Runner, batcher: Batcher) -> None:
    async def scenario() -> None:
        rows = [Item(features={"n": np.array(n)}, n_tokens=1 + n * 37 % 400) for n in range(50)]
        assert [array[0] for array in await submit(batcher, rows).done] == [2.0 * n for n in range(50)]

    runner.run(scenario())


def test_a_thread_that_waits_keeps_nothing_of_its_last_batch(runner: asyncio.Runner, batcher: Batcher) -> None:
    async def scenario() -> None:
        rows = items(1, 2)
        kept = [weakref.ref(row.features["n"]) for row in rows]
        await submit(batcher, rows).done
        del rows
        await until(lambda: not any(array() is not None for array in kept))

    runner.run(scenario())


def test_an_item_that_is_there_twice_runs_once(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        one, two, three = items(1, 2, 3)
        equal = items(1)[0]
        found = await submit(batcher, [two, one, two, two, three, one, equal]).done
        assert [array[0] for array in found] == [4.0, 2.0, 4.0, 4.0, 6.0, 2.0, 2.0]
        assert sorted(n for batch in model.batches for n in batch) == [1, 1, 2, 3]

    runner.run(scenario())


def test_a_row_is_named_by_the_first_place_of_its_item(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher
) -> None:
    model.fails = lambda numbers: ValueError("13") if 13 in numbers else None

    async def scenario() -> None:
        one, bad = items(1, 13)
        with pytest.raises(RowError, match="Input 3 failed"):
            await submit(batcher, [one, one, one, bad, bad]).done

    runner.run(scenario())


def test_rows_that_gather_while_a_batch_runs_go_together(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher
) -> None:
    async def scenario() -> None:
        model.gate.clear()
        first = submit(batcher, items(0))
        await until(lambda: model.batches)
        later = [submit(batcher, items(n)) for n in range(1, 20)]
        model.gate.set()
        await asyncio.gather(first.done, *(ticket.done for ticket in later))
        assert model.batches == [[0], list(range(1, 20))]

    runner.run(scenario())


def test_what_waits_waits_for_rows_that_are_expected(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        for _ in range(N_ROUNDS):
            with batcher.expecting():
                with batcher.expecting():
                    first = submit(batcher, items(1))
                await others_turn()
                second = submit(batcher, items(2))
            await asyncio.gather(first.done, second.done)
        assert model.batches == [[1, 2]] * N_ROUNDS

    runner.run(scenario())


def test_a_call_that_is_expected_and_cannot_be_read_holds_nobody_up(runner: asyncio.Runner, batcher: Batcher) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="unreadable"), batcher.expecting():
            ticket = submit(batcher, items(1))
            raise ValueError("unreadable")
        await ticket.done

    runner.run(scenario())


@pytest.mark.parametrize("leave", [False, True])
def test_calls_that_come_to_nothing_one_after_the_other_hold_nobody_up(
    runner: asyncio.Runner, batcher: Batcher, leave: bool
) -> None:
    """Those that are refused, and those whose callers leave before they run."""

    async def scenario() -> None:
        reading = ExitStack()
        reading.enter_context(batcher.expecting())
        ticket = submit(batcher, items(1))
        for _ in range(N_ROUNDS):  # there is always one that is being read
            later = ExitStack()
            later.enter_context(batcher.expecting())
            if leave:
                batcher.drop(submit(batcher, items(2)))
            reading.close()
            reading = later
        async with asyncio.timeout(10):
            await ticket.done
        reading.close()

    runner.run(scenario())


def test_many_rows_wait_for_no_others(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        for _ in range(N_ROUNDS):
            with batcher.expecting():
                few = submit(batcher, items(*range(51)))
                await others_turn()
                one_more = submit(batcher, items(51))
                await asyncio.gather(few.done, one_more.done)
        assert [len(batch) for batch in model.batches] == [52] * N_ROUNDS

    runner.run(scenario())


def test_the_end_waits_for_no_others(runner: asyncio.Runner, batcher: Batcher) -> None:
    async def scenario() -> None:
        with batcher.expecting():
            ticket = submit(batcher, items(1))
            await asyncio.to_thread(batcher.close)
            await ticket.done

    runner.run(scenario())


@pytest.mark.parametrize(("n_tokens", "sizes"), [(13, [4, 4]), (12, [8])])
def test_threads_that_are_free_divide_what_waits_but_not_a_little(
    runner: asyncio.Runner, model: Doubler, n_tokens: int, sizes: list[int]
) -> None:
    batcher = started(model, n_threads=2)

    async def scenario() -> None:
        ticket = submit(batcher, items(*range(8), n_tokens=n_tokens))
        await until(lambda: sum(map(len, model.batches)) == 8)
        model.gate.set()
        await ticket.done
        assert [len(batch) for batch in model.batches] == sizes

    model.gate.clear()
    runner.run(scenario())
    batcher.close()


@pytest.mark.parametrize(("n_tokens", "together"), [(10, True), (90, False), (100, False)])
def test_a_few_rows_wait_for_a_batch_where_both_together_are_few(
    runner: asyncio.Runner, model: Doubler, n_tokens: int, together: bool
) -> None:
    async def scenario(batcher: Batcher) -> None:
        tickets = [submit(batcher, items(0, n_tokens=n_tokens))]
        await until(lambda: model.batches)
        tickets.append(submit(batcher, items(1)))
        await others_turn()
        tickets.append(submit(batcher, items(2)))
        if not together:
            await until(lambda: len(model.batches) == 2)
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))

    for _ in range(N_ROUNDS):
        model.gate.clear()
        model.batches.clear()
        batcher = started(model, n_threads=2)
        runner.run(scenario(batcher))
        batcher.close()
        if together:
            assert model.batches == [[0], [1, 2]]


@pytest.mark.parametrize("others", [set(), {"another"}])
def test_few_tokens_alone_divide_over_a_second_core_where_no_other_model_runs(
    runner: asyncio.Runner, model: Doubler, others: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    computing = set(others)
    batcher, found, forward = started(model, n_threads=2, n_cores=2, computing=computing), [], model.forward

    def counted(items: Sequence[Item]) -> list[Array]:
        arrays = forward(items)
        assert computing == {*others, "doubler"}
        found.append((threading.current_thread().name, len(items), torch.get_num_threads()))
        return arrays

    async def call(n_rows: int) -> None:
        """A call into idle threads, whose batches end when all of it is in one."""
        model.gate.clear()
        model.batches.clear()
        await until(lambda: len(batcher._idle) == 2)
        ticket = submit(batcher, items(*range(n_rows)))
        await until(lambda: sum(map(len, model.batches)) == n_rows)
        model.gate.set()
        await ticket.done

    async def scenario() -> None:
        for n_rows in (1, 18, 1):
            await call(n_rows)
        model.gate.clear()
        model.batches.clear()
        await until(lambda: len(batcher._idle) == 2)
        long = submit(batcher, items(-1, n_tokens=97))
        await until(lambda: model.batches)
        beside = submit(batcher, items(-2))
        await until(lambda: len(model.batches) == 2)
        model.gate.set()
        await asyncio.gather(long.done, beside.done)

    monkeypatch.setattr(model, "forward", counted)
    runner.run(scenario())
    batcher.close()
    assert computing == others
    few = ("doubler-0", 1, 1 if others else 2)
    assert (found[0], found[3]) == (few, few)
    assert sorted(found[1:3]) == [("doubler-0", 9, 1), ("doubler-1", 9, 1)]
    assert sorted(found[4:]) == [("doubler-0", 1, 1), ("doubler-1", 1, 1)]  # a long row, and one beside it


def test_rows_do_not_wait_for_a_batch_with_which_they_are_more_than_few(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, n_threads=2)

    async def scenario() -> None:
        first = submit(batcher, items(0))
        await until(lambda: model.batches)
        many = submit(batcher, items(*range(1, 11)))
        await until(lambda: len(model.batches) == 2)
        model.gate.set()
        await asyncio.gather(first.done, many.done)

    model.gate.clear()
    runner.run(scenario())
    batcher.close()


def test_rows_do_not_wait_for_few_that_run_beside_a_long_one(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, n_threads=3)

    async def scenario() -> None:
        tickets = []
        for n_tokens in (97, 10, 10):
            tickets.append(submit(batcher, items(0, n_tokens=n_tokens)))
            await until(lambda: len(model.batches) == len(tickets))
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))

    model.gate.clear()
    runner.run(scenario())
    batcher.close()


def test_few_tokens_alone_may_be_more_than_a_batch_beside_another_holds(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, n_threads=2, few_tokens=200, max_batch_tokens=100)

    async def scenario() -> None:
        alone = submit(batcher, items(*range(20)))
        await until(lambda: model.batches)
        beside = submit(batcher, items(*range(20, 39)))
        await until(lambda: len(model.batches) == 2)
        model.gate.set()
        await asyncio.gather(alone.done, beside.done)
        assert [len(batch) for batch in model.batches] == [20, 10, 9]

    model.gate.clear()
    runner.run(scenario())
    batcher.close()


@pytest.mark.parametrize("why", ["another lane", "another mate", "another model"])
def test_few_tokens_that_are_not_alone_are_no_more_than_a_batch_holds(
    runner: asyncio.Runner, model: Doubler, why: str
) -> None:
    computing = {"another"} if why == "another model" else set()
    batcher = started(model, n_threads=2, few_tokens=200, max_batch_tokens=100, computing=computing)

    async def scenario() -> None:
        with batcher.expecting():
            rest = items(*range(15, 19))
            if why == "another mate":
                rest = [replace(item, mate="other") for item in rest]
            priority = Priority.BACKGROUND if why == "another lane" else Priority.INTERACTIVE
            tickets = [submit(batcher, items(*range(15))), submit(batcher, rest, priority)]
        await until(lambda: len(model.batches) == 2)
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))
        assert max(map(len, model.batches)) == 10

    model.gate.clear()
    runner.run(scenario())
    batcher.close()


def test_rows_wait_for_as_many_as_are_few(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, few_tokens=1_000)

    async def scenario() -> None:
        for _ in range(N_ROUNDS):
            with batcher.expecting():
                early = submit(batcher, items(*range(99)))
                await others_turn()
                late = submit(batcher, items(99))
            await asyncio.gather(early.done, late.done)
        assert [len(batch) for batch in model.batches] == [100] * N_ROUNDS

    runner.run(scenario())
    batcher.close()


def test_interactive_rows_go_before_background_rows(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        model.gate.clear()
        tickets = [submit(batcher, items(0))]
        await until(lambda: model.batches)
        tickets.append(submit(batcher, items(1, n_tokens=1000), Priority.BACKGROUND))
        tickets.append(submit(batcher, items(2, n_tokens=1000)))
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))
        assert model.batches == [[0], [2], [1]]

    runner.run(scenario())


@pytest.mark.parametrize("caller", ["another", "the same"])
def test_a_single_row_waits_for_one_batch_of_a_long_call(runner: asyncio.Runner, model: Doubler, caller: str) -> None:
    batcher = started(model, max_waiting_rows=10_000)

    async def scenario() -> None:
        model.gate.clear()
        long = submit(batcher, items(*range(5_000), n_tokens=100), caller="the same")
        await until(lambda: model.batches)
        single = submit(batcher, items(-1), caller=caller)
        model.gate.set()
        await asyncio.gather(long.done, single.done)
        assert -1 in model.batches[1]
        assert not any(batcher._n_calls.values())

    runner.run(scenario())
    batcher.close()


@pytest.mark.parametrize("others", ["named", "nameless"])
def test_a_long_call_has_its_share_beside_callers_of_single_rows(
    runner: asyncio.Runner, model: Doubler, others: str
) -> None:
    batcher = started(model, max_batch_tokens=100, few_tokens=0)
    asked = run = 0

    async def again_and_again(caller: str) -> None:
        nonlocal asked
        while True:
            ticket = submit(batcher, items(-1, n_tokens=100), caller=caller)
            asked += 1
            await ticket.done

    def busy(numbers: list[int]) -> None:
        """As slow a model that the others have asked again before a row is done."""
        nonlocal run
        run += numbers == [-1]
        for _ in range(10_000):
            if asked - run >= 3:
                return
            time.sleep(0.001)

    model.fails = busy

    async def scenario() -> None:
        asking = [asyncio.create_task(again_and_again(f"{n}" * (others == "named"))) for n in range(4)]
        await until(lambda: run > 8)
        before = run
        async with asyncio.timeout(10):
            await submit(batcher, items(*range(5), n_tokens=100), caller="long").done
        assert 12 <= run - before <= 30
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)

    runner.run(scenario())
    asked += 4  # that nobody asks any more
    batcher.close()


def test_long_calls_of_two_callers_go_side_by_side(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, max_waiting_rows=10_000)

    async def scenario() -> None:
        model.gate.clear()
        tickets = [submit(batcher, items(-1))]
        await until(lambda: model.batches)
        tickets.append(submit(batcher, items(*range(1_000), n_tokens=100), caller="first"))
        tickets.append(submit(batcher, items(*range(1_000, 2_000), n_tokens=100), caller="second"))
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))
        half = [number for batch in model.batches[1:101] for number in batch]
        of_first = sum(number < 1_000 for number in half)
        assert 0.4 < of_first / len(half) < 0.6

    runner.run(scenario())
    batcher.close()


def test_rows_of_a_failed_call_do_not_hold_up_the_next(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, max_waiting_rows=10_000)
    model.fails = lambda numbers: ValueError("bad") if -1 in numbers else None

    async def scenario() -> None:
        model.gate.clear()
        failing = submit(batcher, items(-1, *range(3_000), n_tokens=1_000))
        await until(lambda: model.batches)
        other = submit(batcher, items(7, n_tokens=1_000), Priority.BACKGROUND)
        model.gate.set()
        assert (await other.done)[0][0] == 14.0
        with pytest.raises(RowError):
            await failing.done

    runner.run(scenario())
    batcher.close()


def test_a_bad_row_fails_its_own_call_only(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    model.fails = lambda numbers: ValueError("13") if 13 in numbers else None

    async def scenario() -> None:
        model.gate.clear()
        blocker = submit(batcher, items(0))
        await until(lambda: model.batches)
        good, bad, other = submit(batcher, items(1, 2, 3)), submit(batcher, items(4, 13)), submit(batcher, items(5))
        model.gate.set()
        with pytest.raises(RowError, match="Input 1 failed"):
            await bad.done
        assert [array[0] for array in await good.done] == [2.0, 4.0, 6.0]
        assert (await other.done)[0][0] == 10.0
        await blocker.done

    runner.run(scenario())


def test_out_of_memory_halves_the_batch_and_lowers_the_budget(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher
) -> None:
    model.fails = lambda numbers: RuntimeError("CUDA out of memory") if len(numbers) > 4 else None

    async def scenario() -> None:
        rows = items(*range(8), n_tokens=10) + items(*range(8, 16), n_tokens=30)
        arrays = await submit(batcher, rows).done
        assert [array[0] for array in arrays] == [2.0 * n for n in range(16)]
        assert batcher.max_batch_tokens == 40  # though the half of longer rows failed later
        model.batches.clear()
        await submit(batcher, items(*range(9))).done  # fewer than were few
        assert [len(batch) for batch in model.batches] == [4, 4, 1]

    runner.run(scenario())


def test_batches_grow_again_after_memory_was_short_for_a_while(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher
) -> None:
    model.fails = lambda numbers: RuntimeError("CUDA out of memory") if len(numbers) > 1 else None

    async def scenario() -> None:
        await submit(batcher, items(*range(4), n_tokens=250)).done
        assert batcher.max_batch_tokens == 250
        model.fails = lambda _: None
        for _ in range(97):  # two rows have run alone since, and filled their batches
            await submit(batcher, items(0, n_tokens=20)).done  # not full: it shows nothing
            await submit(batcher, items(0, n_tokens=200)).done
        assert batcher.max_batch_tokens == 250
        for n_tokens in (500, 1_000, 1_000):
            await submit(batcher, items(*range(200), n_tokens=200)).done
            assert batcher.max_batch_tokens == n_tokens
        model.batches.clear()
        await submit(batcher, items(*range(5), n_tokens=200)).done
        assert [len(batch) for batch in model.batches] == [5]
        assert (batcher.max_batch_tokens, batcher._few_tokens) == batcher._most_tokens

    runner.run(scenario())


def test_what_is_few_grows_again_where_it_is_more_than_a_batch(runner: asyncio.Runner, model: Doubler) -> None:
    """As on two cores, where few that are alone are what two batches hold."""
    batcher = started(model, max_batch_tokens=100, few_tokens=200)
    model.fails = lambda numbers: RuntimeError("CUDA out of memory") if len(numbers) > 1 else None

    async def scenario() -> None:
        await submit(batcher, items(0, 1, n_tokens=100)).done
        assert (batcher.max_batch_tokens, batcher._few_tokens) == (100, 100)
        model.fails = lambda _: None
        await submit(batcher, items(*range(200), n_tokens=100)).done
        assert (batcher.max_batch_tokens, batcher._few_tokens) == (100, 200)

    runner.run(scenario())
    batcher.close()


def test_what_a_failed_batch_held_is_gone_before_its_halves_run(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher
) -> None:
    held: list[weakref.ref[Array]] = []

    def fails(numbers: list[int]) -> BaseException | None:
        assert all(each() is None for each in held)
        states = np.zeros(len(numbers))  # lives in this frame, as a batch's tensors do
        held.append(weakref.ref(states))
        if len(numbers) > 1:
            raise RuntimeError("CUDA out of memory")
        return None

    model.fails = fails

    async def scenario() -> None:
        arrays = await submit(batcher, items(*range(4))).done
        assert [array[0] for array in arrays] == [0.0, 2.0, 4.0, 6.0]

    runner.run(scenario())
    assert len(held) == 7


def test_dropped_rows_never_reach_the_model(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        model.gate.clear()
        first = submit(batcher, items(0))
        await until(lambda: model.batches)
        gone, stays = submit(batcher, items(*range(1, 50))), submit(batcher, items(99))
        batcher.drop(gone)
        assert batcher.n_waiting == 1
        model.gate.set()
        await asyncio.gather(first.done, stays.done)
        assert model.batches == [[0], [99]]

    runner.run(scenario())


@pytest.mark.parametrize("queued", [True, False])
def test_a_caller_who_left_is_not_slower_next_time(
    runner: asyncio.Runner, model: Doubler, batcher: Batcher, queued: bool
) -> None:
    async def scenario() -> None:
        model.gate.clear()
        first = submit(batcher, items(0))
        await until(lambda: model.batches)
        rows = items(1, n_tokens=1000)
        gone = opened(rows, caller="one")
        if queued:
            batcher.submit(gone, rows, Priority.INTERACTIVE)
            batcher.drop(gone)
        else:
            batcher.drop(gone)
            batcher.submit(gone, rows, Priority.INTERACTIVE)
        assert not batcher.n_waiting
        later = [submit(batcher, items(n, n_tokens=1000), caller=caller) for n, caller in ((2, "one"), (3, "another"))]
        model.gate.set()
        await asyncio.gather(first.done, *(ticket.done for ticket in later))
        assert model.batches == [[0], [2], [3]]

    runner.run(scenario())


def test_rows_that_wait_have_a_bounded_memory(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, max_waiting_bytes=3_000)

    def pictures(*numbers: int) -> list[Item]:
        return [Item(features={"n": np.array(n), "pixels": np.zeros(992, np.uint8)}, n_tokens=900) for n in numbers]

    async def scenario() -> None:
        model.gate.clear()
        running = submit(batcher, pictures(0))
        await until(lambda: model.batches)
        waiting = submit(batcher, pictures(1, 2))
        left = submit(batcher, pictures(3))
        with pytest.raises(UnavailableError, match="full"):
            submit(batcher, pictures(4))
        batcher.drop(left)
        taken = submit(batcher, pictures(4))
        model.gate.set()
        await asyncio.gather(running.done, waiting.done, taken.done)
        assert sorted(n for batch in model.batches for n in batch) == [0, 1, 2, 4]
        assert (batcher._n_waiting_bytes, batcher._n_waiting_tokens) == (0, 0)
        model.gate.clear()
        shared = np.zeros(992, np.uint8)
        pairs = [Item(features={"n": np.array(n), "pixels": shared}, n_tokens=900) for n in range(10, 15)]
        running = submit(batcher, pictures(10))
        await until(lambda: len(model.batches) == 5)
        waiting, more = submit(batcher, pictures(15)), submit(batcher, pairs[:4])  # a picture of theirs counts once
        with pytest.raises(UnavailableError, match="full"):
            submit(batcher, pictures(16))
        model.gate.set()
        await asyncio.gather(running.done, waiting.done, more.done)
        n_batches = len(model.batches)
        model.gate.clear()
        first = submit(batcher, pictures(5))
        await until(lambda: len(model.batches) > n_batches)
        large = submit(batcher, pictures(6, 7, 8, 9))  # into an empty queue
        model.gate.set()
        await asyncio.gather(first.done, large.done)

    runner.run(scenario())
    batcher.close()


def test_a_full_queue_refuses_and_recovers(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    async def scenario() -> None:
        model.gate.clear()
        tickets = [submit(batcher, items(0))]
        await until(lambda: model.batches)
        tickets.append(submit(batcher, items(*range(1, 100))))
        with pytest.raises(UnavailableError, match="full") as refused:
            submit(batcher, items(1, 2))
        assert refused.value.retry_after_seconds
        model.gate.set()
        await asyncio.gather(*(ticket.done for ticket in tickets))
        assert (await submit(batcher, items(7)).done)[0][0] == 14.0

    runner.run(scenario())


def test_a_call_larger_than_the_queue_is_taken_when_nothing_waits(runner: asyncio.Runner, batcher: Batcher) -> None:
    async def scenario() -> None:
        assert len(await submit(batcher, items(*range(500))).done) == 500

    runner.run(scenario())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [SystemExit("gone"), device_error(700)])
def test_a_dead_thread_fails_what_runs_and_waits_and_says_so(
    runner: asyncio.Runner, model: Doubler, error: BaseException
) -> None:
    batcher = started(model)
    model.fails = lambda numbers: error if 0 in numbers else None

    async def scenario() -> None:
        model.gate.clear()
        running = submit(batcher, items(0))
        await until(lambda: model.batches)
        waiting = submit(batcher, items(1))
        model.gate.set()
        for ticket in (running, waiting):
            with pytest.raises(UnavailableError, match="stopped"):
                await ticket.done
        assert batcher._deaths == {"doubler": error}
        assert not batcher._computing
        with pytest.raises(UnavailableError, match="stopped"):
            submit(batcher, items(2))

    runner.run(scenario())


@pytest.mark.parametrize("rescued", [True, False])
def test_a_row_that_is_not_finite_is_run_again_in_float32(
    runner: asyncio.Runner, model: Doubler, rescued: bool
) -> None:
    forward = model.forward
    model.forward = lambda rows: [array * (np.nan if array[0] == 6 else 1) for array in forward(rows)]  # type: ignore[method-assign]
    batcher = started(model, rescue=lambda items: [np.array([6.5 if rescued else np.inf]) for _ in items])

    async def scenario() -> None:
        ticket, other = submit(batcher, items(1, 2, 3)), submit(batcher, items(4))
        assert (await other.done)[0][0] == 8.0
        if rescued:
            assert [array[0] for array in await ticket.done] == [2.0, 4.0, 6.5]
        else:
            with pytest.raises(RowError, match="Input 2"):
                await ticket.done

    runner.run(scenario())
    batcher.close()


def test_a_row_that_is_not_finite_spoils_no_neighbour(runner: asyncio.Runner, model: Doubler, batcher: Batcher) -> None:
    forward = model.forward
    model.forward = lambda rows: [array * (np.nan if 3 in model.batches[-1] else 1) for array in forward(rows)]  # type: ignore[method-assign]

    async def scenario() -> None:
        with batcher.expecting():
            bad, good = submit(batcher, items(3, 3)), submit(batcher, items(1, 2))
        with pytest.raises(RowError, match="Input 0 gives"):
            await bad.done
        assert [array[0] for array in await good.done] == [2.0, 4.0]
        assert len(model.batches[0]) == 4

    runner.run(scenario())


def test_rows_that_are_not_finite_are_run_again_in_float32_together(runner: asyncio.Runner, model: Doubler) -> None:
    forward, loads = model.forward, []
    model.forward = lambda rows: [array * (np.nan if array[0] >= 6 else 1) for array in forward(rows)]  # type: ignore[method-assign]

    def rescue(rows: Sequence[Item]) -> list[Array]:
        loads.append(len(rows))
        return [2.0 * row.features["n"][None] for row in rows]

    batcher = started(model, rescue=rescue)

    async def scenario() -> None:
        assert [array[0] for array in await submit(batcher, items(5, 1, 4, 2, 3)).done] == [10.0, 2.0, 8.0, 4.0, 6.0]
        assert loads == [3]

    runner.run(scenario())
    batcher.close()


def test_closing_finishes_what_waits(runner: asyncio.Runner, model: Doubler) -> None:
    batcher = started(model, n_threads=3)

    async def scenario() -> None:
        ticket = submit(batcher, items(*range(300)))
        await asyncio.to_thread(batcher.close)
        assert len(await ticket.done) == 300

    runner.run(scenario())
