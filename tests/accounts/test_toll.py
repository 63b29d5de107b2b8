"""What a batch job takes from its key's minute."""

import asyncio
from collections.abc import Iterator

import pytest

from fundament.accounts.toll import Toll
from fundament.accounts.visits import NO_LIMITS
from fundament.config import Tier
from fundament.errors import LimitError
from fundament.limits import WINDOW_SECONDS, MemoryLimits
from tests.clock import Clock, set_clock

TIER = Tier(tokens_per_minute=100)


@pytest.fixture
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield set_clock(patch)


@pytest.fixture
def limits(clock: Clock) -> MemoryLimits:
    return MemoryLimits()


def used(limits: MemoryLimits, runner: asyncio.Runner) -> int:
    return runner.run(limits.spend("key", TIER, 0)).n_tokens


def test_what_the_minute_has_is_taken_at_once(limits: MemoryLimits, runner: asyncio.Runner) -> None:
    toll = Toll(limits, "key", TIER)
    runner.run(toll.admit(60))
    runner.run(toll.admit(40))
    assert (toll.n_admitted, used(limits, runner)) == (100, 100)


def test_more_than_a_minute_is_taken_over_several(limits: MemoryLimits, clock: Clock, runner: asyncio.Runner) -> None:
    began, given, n_waits = clock.now, 0, 0
    while True:
        toll = Toll(limits, "key", TIER, given)
        try:
            runner.run(toll.admit(250))
            break
        except LimitError as error:
            assert given < toll.n_admitted < 250
            given, n_waits = toll.n_admitted, n_waits + 1
            clock.now += error.retry_after_seconds or 0
    assert toll.n_admitted == 250
    assert n_waits == 2  # 100 at once, 100, and 50
    assert clock.now - began <= 4 * WINDOW_SECONDS


def test_a_minute_that_others_use_gives_what_is_left(
    limits: MemoryLimits, clock: Clock, runner: asyncio.Runner
) -> None:
    runner.run(limits.spend("key", TIER, 70))
    clock.now += 20
    toll = Toll(limits, "key", TIER)
    with pytest.raises(LimitError, match="no room for 50 tokens more") as refused:
        runner.run(toll.admit(80))
    assert toll.n_admitted == 30
    clock.now += refused.value.retry_after_seconds or 0
    toll = Toll(limits, "key", TIER, toll.n_admitted)
    runner.run(toll.admit(80))
    assert toll.n_admitted == 80


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
