"""What a batch job takes from its key's minute."""

import asyncio

import pytest

from fundament.accounts.toll import Toll
from fundament.accounts.visits import NO_LIMITS
from fundament.config import Tier
from fundament.errors import LimitError
from fundament.limits import WINDOW_SECONDS, MemoryLimits

TIER = Tier(tokens_per_minute=100)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> MemoryLimits:
    return MemoryLimits(clock)


def used(limits: MemoryLimits, runner: asyncio.Runner) -> int:
    return runner.run(limits.spend("key", TIER, 0)).n_tokens


def test_what_the_minute_has_is_taken_at_once(limits: MemoryLimits, runner: asyncio.Runner) -> None:
    toll = Toll(limits, "key", TIER)
    runner.run(toll.admit(60))
    runner.run(toll.admit(40))
    assert (toll.n_admitted, used(limits, runner)) == (100, 100)


def test_more_than_a_minute_is_taken_over_several(limits: MemoryLimits, clock: Clock, runner: asyncio.Runner) -> None:
    given = 0
    for minute, missing in enumerate((150, 50)):
        clock.now = minute * WINDOW_SECONDS
        toll = Toll(limits, "key", TIER, given)
        with pytest.raises(LimitError, match=f"no room for {missing} tokens more") as refused:
            runner.run(toll.admit(250))
        assert refused.value.retry_after_seconds == WINDOW_SECONDS
        given = toll.n_admitted
    clock.now = 2 * WINDOW_SECONDS
    toll = Toll(limits, "key", TIER, given)
    runner.run(toll.admit(250))
    assert (toll.n_admitted, used(limits, runner)) == (250, 50)


def test_a_minute_that_others_use_gives_what_is_left(
    limits: MemoryLimits, clock: Clock, runner: asyncio.Runner
) -> None:
    runner.run(limits.spend("key", TIER, 70))
    clock.now = 20
    toll = Toll(limits, "key", TIER)
    with pytest.raises(LimitError) as refused:
        runner.run(toll.admit(80))
    assert (toll.n_admitted, refused.value.retry_after_seconds) == (30, WINDOW_SECONDS - 20)


def test_rows_that_failed_are_asked_for_again_and_not_taken_again(limits: MemoryLimits, runner: asyncio.Runner) -> None:
    toll = Toll(limits, "key", TIER)
    runner.run(toll.admit(80))
    toll.refund(80)
    runner.run(toll.admit(50))
    runner.run(toll.admit(30))
    assert used(limits, runner) == 80


def test_no_limit_takes_nothing(limits: MemoryLimits, runner: asyncio.Runner) -> None:
    runner.run(Toll(limits, "", NO_LIMITS).admit(10**9))
    assert used(limits, runner) == 0
