"""Windows that remember every entry, in memory and in Redis, and requests at once."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from fundament.config import Tier
from fundament.errors import FundamentError, UnavailableError
from fundament.limits import WINDOW_SECONDS, Limits, MemoryLimits, RedisLimits, new_lease

TIER = Tier(requests_per_minute=100, tokens_per_minute=1_000, concurrency=3)


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client of an empty Redis."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture(params=["memory", "redis"])
def limits(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Limits]:
    if request.param == "memory":
        yield MemoryLimits()
        return
    request.getfixturevalue("redis")
    found = RedisLimits(request.getfixturevalue("redis_url"))
    yield found
    runner.run(found.close())


def test_requests_are_counted_exactly_and_each_caller_for_itself(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        tier = Tier(requests_per_minute=100)
        found = await asyncio.gather(*(limits.enter("one", tier, new_lease()) for _ in range(250)))
        assert sum(not standing.refused for standing in found) == 100
        refused = await limits.enter("one", tier, new_lease())
        assert (refused.refused, refused.n_requests) == ("requests", 100)
        assert 0 < refused.wait_seconds <= refused.requests_seconds <= WINDOW_SECONDS
        other = await limits.enter("two", tier, new_lease())
        assert (other.refused, other.n_requests) == ("", 1)

    runner.run(work())


def test_tokens_are_taken_whole_or_not_at_all(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(limits.spend("one", TIER, 300) for _ in range(20)))
        assert sum(not standing.refused for standing in found) == 3
        assert (await limits.spend("one", TIER, 101)).refused == "tokens"
        rest = await limits.spend("one", TIER, 100)
        assert (rest.refused, rest.n_tokens) == ("", 1_000)
        never = await limits.spend("two", TIER, 1_001)
        assert (never.refused, never.n_tokens, never.wait_seconds) == ("tokens", 0, WINDOW_SECONDS)

    runner.run(work())


def test_requests_at_once_are_let_in_again_as_they_leave(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        leases = [new_lease() for _ in range(10)]
        found = await asyncio.gather(*(limits.enter("one", TIER, lease) for lease in leases))
        inside = [lease for lease, standing in zip(leases, found, strict=True) if not standing.refused]
        assert len(inside) == 3
        refused = await limits.enter("one", TIER, "another")
        assert (refused.refused, refused.n_running) == ("concurrency", 3)
        assert refused.n_requests == 3  # a refused one does not count
        for _ in range(2):  # twice is once
            await limits.leave("one", inside[0])
        await limits.leave("one", "nobody's")
        assert not (await limits.enter("one", TIER, "another")).refused
        assert (await limits.enter("one", TIER, "one more")).refused == "concurrency"

    runner.run(work())


def test_what_has_no_limit_is_not_counted(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        for _ in range(5):
            entered = await limits.enter("one", Tier(), new_lease())
            spent = await limits.spend("one", Tier(), 10**12)
        assert (entered.refused, entered.n_running, entered.n_requests) == ("", 0, 0)
        assert (spent.refused, spent.n_tokens) == ("", 0)

    runner.run(work())


class Brute:
    """The last minute, looked at as a whole each time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken: list[tuple[float, int]] = []

    def take(self, now: float, amount: int) -> bool:
        total = sum(each for at, each in self.taken if at > now - WINDOW_SECONDS)
        fits = total + amount <= self.limit
        if fits:
            self.taken.append((now, amount))
        return fits


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 7.5, 29, 60, 61]), st.integers(1, 40)), max_size=40))
def test_any_minute_holds_no_more_than_the_limit(steps: list[tuple[float, int]]) -> None:
    async def work() -> None:
        clock, brute, tier = Clock(), Brute(50), Tier(tokens_per_minute=50)
        limits = MemoryLimits(clock)
        for seconds, amount in steps:
            clock.now += seconds
            fits = brute.take(clock.now, amount)
            standing = await limits.spend("one", tier, amount)
            assert (not standing.refused) == fits
            if standing.refused:
                clock.now += standing.wait_seconds  # the wait that was named is enough
                assert brute.take(clock.now, amount)
                assert not (await limits.spend("one", tier, amount)).refused

    asyncio.run(work())


def test_memory_forgets_who_did_nothing_for_a_minute(runner: asyncio.Runner) -> None:
    async def work() -> None:
        clock = Clock()
        limits = MemoryLimits(clock)
        for number in range(100):
            await limits.enter(str(number), TIER, "lease")
            if number:
                await limits.leave(str(number), "lease")
        clock.now += WINDOW_SECONDS
        await limits.enter("new", TIER, "lease")
        assert set(limits._books) == {"0", "new"}  # one is still running

    runner.run(work())


def test_redis_forgets_by_its_own_clock(redis: Redis, redis_url: str, runner: asyncio.Runner) -> None:
    async def work() -> None:
        limits = RedisLimits(redis_url)
        now = redis.time()[0] * 1000
        redis.rpush("fundament:{one}:tokens", f"{now - 60_000}:700", f"{now - 30_000}:200", f"{now}:90")
        redis.set("fundament:{one}:total", 990)
        redis.rpush("fundament:{one}:requests", *[f"{now - 60_000}:1"] * 100)
        redis.zadd("fundament:{one}:leases", {"dead": now - 1, "alive": now + 20_000})
        entered = await limits.enter("one", TIER, "mine")
        assert (entered.refused, entered.n_running, entered.n_requests) == ("", 2, 1)
        assert entered.n_tokens == 290
        refused = await limits.spend("one", TIER, 800)
        assert refused.refused == "tokens"
        assert 0 < refused.wait_seconds <= 30
        assert all(redis.pttl(f"fundament:{{one}}:{name}") > 0 for name in ("requests", "leases"))
        await limits.close()

    runner.run(work())


def test_a_lease_in_redis_is_renewed_while_its_request_runs(
    redis: Redis, redis_url: str, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundament.limits._RENEW_SECONDS", 0.01)

    async def work() -> None:
        limits = RedisLimits(redis_url)
        await limits.enter("one", TIER, "mine")
        first = redis.zscore("fundament:{one}:leases", "mine")
        async with asyncio.timeout(30):
            while (redis.zscore("fundament:{one}:leases", "mine") or 0) <= (first or 0):
                await asyncio.sleep(0.01)
        await limits.close()

    runner.run(work())


def test_a_redis_that_does_not_answer_is_unavailable(runner: asyncio.Runner) -> None:
    async def work() -> None:
        limits = RedisLimits("redis://127.0.0.1:1/0")
        with pytest.raises(UnavailableError, match="limits"):
            await limits.enter("one", TIER, "lease")
        await limits.close()

    runner.run(work())


def test_a_url_that_is_none() -> None:
    with pytest.raises(FundamentError, match="redis_url"):
        RedisLimits("nonsense")
