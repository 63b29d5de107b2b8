"""The batching policy, as a pure function."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from fundament.core import Priority
from fundament.engine.packing import AGEING_SECONDS, rank, take_batch


@dataclass(frozen=True)
class Waiting:
    n_tokens: int
    arrived: float = 0.0
    priority: Priority = Priority.INTERACTIVE
    mate: str = ""


rows = st.lists(
    st.builds(
        Waiting,
        n_tokens=st.integers(1, 3000),
        arrived=st.floats(0, 100),
        priority=st.sampled_from(Priority),
        mate=st.sampled_from(["", "other"]),
    ),
    max_size=60,
)


@given(rows, st.integers(1, 4096))
def test_a_batch_has_the_most_urgent_row_its_mates_only_and_stays_within_the_budget(
    waiting: list[Waiting], budget: int
) -> None:
    batch = take_batch(waiting, budget)
    assert bool(batch) == bool(waiting)
    assert len(set(batch)) == len(batch)
    if batch:
        lead = waiting[batch[0]]
        assert rank(lead) == min(map(rank, waiting))
        assert {waiting[place].mate for place in batch} == {lead.mate}
        assert len(batch) == 1 or sum(waiting[place].n_tokens for place in batch) <= budget


@given(rows.filter(bool), st.integers(1, 4096))
def test_nobody_is_left_out_who_would_still_fit(waiting: list[Waiting], budget: int) -> None:
    batch = take_batch(waiting, budget)
    taken = sum(waiting[place].n_tokens for place in batch)
    for place, row in enumerate(waiting):
        if place not in batch and row.mate == waiting[batch[0]].mate:
            assert taken + row.n_tokens > budget


@given(rows.filter(bool), st.integers(1, 4096))
def test_taking_batches_ends_with_everybody_served_once(waiting: list[Waiting], budget: int) -> None:
    left, served = list(waiting), []
    while left:
        batch = set(take_batch(left, budget))
        served += [left[place] for place in batch]
        left = [row for place, row in enumerate(left) if place not in batch]
    assert sorted(served, key=repr) == sorted(waiting, key=repr)


def test_interactive_goes_before_background_that_came_first() -> None:
    waiting = [Waiting(10, 0.0, Priority.BACKGROUND), Waiting(10, 1.0)]
    assert take_batch(waiting, 10) == [1]


def test_background_that_has_waited_long_enough_leads() -> None:
    waiting = [Waiting(10, 0.0, Priority.BACKGROUND), Waiting(10, AGEING_SECONDS + 0.1)]
    assert take_batch(waiting, 10) == [0]


def test_interactive_rows_fill_a_batch_before_background_rows_do() -> None:
    waiting = [Waiting(10), Waiting(10, priority=Priority.BACKGROUND), Waiting(30)]
    assert take_batch(waiting, 40) == [0, 2]


def test_rows_of_like_length_join_first() -> None:
    waiting = [Waiting(100), Waiting(400), Waiting(90), Waiting(120)]
    assert take_batch(waiting, 320) == [0, 2, 3]


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert take_batch([Waiting(5000), Waiting(1)], 100) == [0]
