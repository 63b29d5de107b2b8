"""The batching policy, as a pure function."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import count, pairwise
from operator import itemgetter

from hypothesis import given
from hypothesis import strategies as st

from fundament.core import Priority
from fundament.engine.packing import AGEING_SECONDS, advanced, dues, share, take_batch, turn


@dataclass(frozen=True)
class Waiting:
    n_tokens: int
    priority: Priority = Priority.INTERACTIVE
    mate: str = ""


rows = st.lists(
    st.builds(
        Waiting,
        n_tokens=st.integers(1, 3000),
        priority=st.sampled_from(Priority),
        mate=st.sampled_from(["", "other"]),
    ),
    max_size=60,
)


@given(rows, st.integers(1, 4096))
def test_a_batch_has_the_first_row_its_mates_only_and_stays_within_the_budget(
    waiting: list[Waiting], budget: int
) -> None:
    batch = take_batch(waiting, budget)
    assert bool(batch) == bool(waiting)
    assert len(set(batch)) == len(batch)
    if batch:
        lead = waiting[batch[0]]
        assert batch[0] == 0
        assert {waiting[place].mate for place in batch} == {lead.mate}
        assert max(waiting[place].priority for place in batch) == lead.priority
        assert len(batch) == 1 or sum(waiting[place].n_tokens for place in batch) <= budget


@given(rows.filter(bool), st.integers(1, 4096))
def test_nobody_is_left_out_who_would_still_fit(waiting: list[Waiting], budget: int) -> None:
    batch = take_batch(waiting, budget)
    taken = sum(waiting[place].n_tokens for place in batch)
    for place, row in enumerate(waiting):
        if place not in batch and row.mate == waiting[0].mate and row.priority <= waiting[0].priority:
            assert taken + row.n_tokens > budget


@given(rows.filter(bool), st.integers(1, 4096))
def test_taking_batches_ends_with_everybody_served_once(waiting: list[Waiting], budget: int) -> None:
    left, served = list(waiting), []
    while left:
        batch = set(take_batch(left, budget))
        served += [left[place] for place in batch]
        left = [row for place, row in enumerate(left) if place not in batch]
    assert sorted(served, key=repr) == sorted(waiting, key=repr)


def test_background_rows_do_not_make_an_interactive_batch_longer() -> None:
    waiting = [Waiting(10), Waiting(10, Priority.BACKGROUND), Waiting(30)]
    assert take_batch(waiting, 100) == [0, 2]


def test_interactive_rows_fill_a_background_batch_first() -> None:
    waiting = [Waiting(10, Priority.BACKGROUND), Waiting(10, Priority.BACKGROUND), Waiting(30)]
    assert take_batch(waiting, 40) == [0, 2]


def test_interactive_goes_before_background_that_came_first() -> None:
    assert turn(Priority.INTERACTIVE, 1.0, 0.0) < turn(Priority.BACKGROUND, 0.0, 0.0)


def test_a_background_row_has_its_turn_however_much_else_waits() -> None:
    now = 1.0 + AGEING_SECONDS
    assert turn(Priority.BACKGROUND, 0.5, 0.9) < turn(Priority.INTERACTIVE, now, now)
    assert turn(Priority.BACKGROUND, 0.5, now) > turn(Priority.INTERACTIVE, now, now)


@given(st.floats(0, 1e9), st.lists(st.integers(1, 3000), min_size=1, max_size=50), st.integers(1, 9))
def test_rows_of_a_call_keep_their_order(clock: float, n_tokens: list[int], n_calls: int) -> None:
    places = dues(clock, n_tokens, n_calls)
    assert len(places) == len(n_tokens)
    assert places[0] >= clock
    assert all(before < after for before, after in pairwise(places))


def test_a_single_row_goes_between_the_rows_of_a_long_call() -> None:
    long = dues(0.0, [100] * 1000, n_calls=1)
    assert long[0] <= dues(long[0], [100], n_calls=1)[0] < long[1]
    assert long[500] <= dues(long[500], [3000], n_calls=1)[0] < long[501]


def test_ones_own_single_row_goes_between_the_rows_of_ones_own_long_call() -> None:
    long = dues(0.0, [100] * 1000, n_calls=1)
    assert dues(0.0, [100], n_calls=2)[0] <= long[1]


def test_two_long_calls_go_side_by_side() -> None:
    first, second = dues(0.0, [100] * 10, n_calls=1), dues(0.0, [100] * 10, n_calls=1)
    order = sorted([*((due, "first") for due in first), *((due, "second") for due in second)])
    assert [sum(name == "first" for _, name in order[: 2 * n]) for n in range(1, 11)] == list(range(1, 11))


def test_many_calls_of_one_caller_leave_room_for_anothers() -> None:
    many = [dues(0.0, [100], n_calls=n)[0] for n in range(1, 101)]
    assert sum(due <= dues(0.0, [100], n_calls=1)[0] for due in many) == 1


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_every_caller_has_its_share_of_what_is_taken(callers: list[tuple[int, int]], seed: int) -> None:
    """Each has so many calls at a time, of so many rows of one token, and the next as soon as one is answered."""
    chance = random.Random(seed)
    clock, taken = 0.0, 0
    lane: list[tuple[float, int, int]] = []  # place, caller, call
    left: dict[int, int] = {}  # rows of a call
    calls, given, numbers = Counter[int](), Counter[int](), count()

    def ask(caller: int) -> None:
        calls[caller] += 1
        call, n_rows = next(numbers), callers[caller][1]
        left[call] = n_rows
        lane.extend((due, caller, call) for due in dues(clock, [1] * n_rows, calls[caller]))

    for caller, (n_calls, _) in enumerate(callers):
        for _ in range(n_calls):
            ask(caller)
    n_steps = 400 * len(callers)
    for _ in range(n_steps):
        chance.shuffle(lane)  # where two have one place
        lane.sort(key=itemgetter(0))
        clock = advanced(clock, taken, len(callers), lane[0][0])
        _, caller, call = lane.pop(0)
        taken = 1
        given[caller] += 1
        left[call] -= 1
        if not left[call]:
            calls[caller] -= 1
            ask(caller)
    assert min(given[caller] for caller in range(len(callers))) > 0.5 * n_steps / len(callers)


def test_rows_of_like_length_join_first() -> None:
    waiting = [Waiting(100), Waiting(400), Waiting(90), Waiting(120)]
    assert take_batch(waiting, 320) == [0, 2, 3]


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert take_batch([Waiting(5000), Waiting(1)], 100) == [0]


def shared(n_waiting: int, n_free: int, *, n_busy: int = 0, n_alone: int = 0, few: int, most: int = 512) -> int:
    return share(n_waiting, n_free, n_busy=n_busy, n_alone=n_alone, few=few, most=most)


@given(st.integers(1, 100_000), st.integers(1, 4), st.sampled_from([0, 96]))
def test_threads_that_are_free_share_all_that_waits(n_waiting: int, n_free: int, few: int) -> None:
    shares, left = [], n_waiting
    for n_busy in range(n_free):
        if left:
            shares.append(shared(left, n_free - n_busy, n_busy=n_busy, few=few, most=100_000))
            left -= shares[-1]
    assert left == 0
    assert max(shares) <= max(few, -(-n_waiting // n_free))


@given(st.integers(1, 5_000), st.integers(1, 4), st.integers(0, 3), st.sampled_from([0, 96, 1024]))
def test_more_than_a_batch_holds_goes_only_where_it_is_alone_and_few(
    n_waiting: int, n_free: int, n_busy: int, few: int
) -> None:
    taken = shared(n_waiting, n_free, n_busy=n_busy, few=few)
    assert 1 <= taken <= n_waiting
    assert taken <= 512 or (taken <= few and not n_busy)


def test_a_few_tokens_stay_together_and_wait_where_they_are_few_with_what_runs() -> None:
    assert shared(96, 2, few=96) == 96
    assert shared(97, 2, few=96) == 49
    assert shared(86, 1, n_busy=1, n_alone=10, few=96) == 0
    assert shared(87, 1, n_busy=1, n_alone=10, few=96) == 87


def test_few_that_are_more_than_a_batch_holds_go_together_where_they_are_alone() -> None:
    assert shared(1_024, 2, few=1_024) == 1_024
    assert shared(1_025, 2, few=1_024) == 512
    assert shared(700, 1, n_busy=1, n_alone=324, few=1_024) == 0
    assert shared(701, 1, n_busy=1, n_alone=324, few=1_024) == 512
    assert shared(700, 1, n_busy=1, few=1_024) == 512


def test_where_none_are_few_all_are_shared() -> None:
    assert shared(2, 2, few=0) == 1
    assert shared(1, 1, n_busy=1, few=0) == 1


def test_what_waits_waits_while_no_thread_is_free() -> None:
    assert shared(1, 0, n_busy=2, few=96) == shared(1_000, 0, n_busy=2, few=0) == 0
