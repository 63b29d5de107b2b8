"""Requests, tokens and requests at once, counted in memory and in Redis."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis

from fundament.config import Tier
from fundament.errors import FundamentError, UnavailableError
from fundament.limits import WINDOW_SECONDS, Limits, MemoryLimits, RedisLimits, SlidingWindow, new_lease
from tests.clock import Clock, set_clock

TIER = Tier(requests_per_minute=100, tokens_per_minute=1_000, concurrency=3)
MARGIN_SECONDS = 0.05  # by which a wait may be longer than it need be

steps = st.lists(st.tuples(st.sampled_from([0, 0.5, 7.5, 29, 60, 61, 130]), st.integers(1, 60)), max_size=40)


@pytest.fixture
def clock() -> Iterator[Clock]:
    """What limits in memory go by."""
    with pytest.MonkeyPatch.context() as patch:
        yield set_clock(patch)


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """A client of an empty Redis."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def shared(redis: Redis, redis_url: str, runner: asyncio.Runner) -> Iterator[RedisLimits]:
    """Limits in that Redis."""
    limits = RedisLimits(redis_url)
    yield limits
    runner.run(limits.close())


@pytest.fixture(params=["memory", "redis"])
def limits(request: pytest.FixtureRequest) -> Limits:
    if request.param == "memory":
        request.getfixturevalue("clock")
        return MemoryLimits()
    return request.getfixturevalue("shared")


def test_requests_are_counted_exactly_and_each_caller_for_itself(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        tier = Tier(requests_per_minute=100)
        found = await asyncio.gather(*(limits.enter("one", tier, new_lease()) for _ in range(250)))
        assert sum(not standing.refused for standing in found) == 100
        refused = await limits.enter("one", tier, new_lease())
        assert (refused.refused, refused.n_requests) == ("requests", 100)
        assert 0 < refused.wait_seconds <= refused.requests_seconds + MARGIN_SECONDS
        other = await limits.enter("two", tier, new_lease())
        assert (other.refused, other.n_requests, other.requests_seconds) == ("", 1, WINDOW_SECONDS)
        of_another_tier = await limits.enter("one", Tier(requests_per_minute=101), new_lease())
        assert (of_another_tier.refused, of_another_tier.n_requests) == ("", 1)

    runner.run(work())


def test_tokens_are_taken_whole_or_not_at_all(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        found = await asyncio.gather(*(limits.spend("one", TIER, 300) for _ in range(20)))
        assert sum(not standing.refused for standing in found) == 3
        assert (await limits.spend("one", TIER, 101)).refused == "tokens"
        rest = await limits.spend("one", TIER, 100)
        assert (rest.refused, rest.n_tokens) == ("", 1_000)
        assert WINDOW_SECONDS < rest.tokens_seconds <= 2 * WINDOW_SECONDS
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


def test_who_came_too_often_does_not_run(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        tier = Tier(requests_per_minute=1, concurrency=2)
        assert not (await limits.enter("one", tier, "inside")).refused
        for _ in range(3):
            assert (await limits.enter("one", tier, new_lease())).refused == "requests"
        assert (await limits.enter("one", tier, new_lease())).n_running == 1

    runner.run(work())


def test_a_redis_that_was_started_anew_is_asked_again(
    shared: RedisLimits, redis: Redis, runner: asyncio.Runner
) -> None:
    for _ in range(3):
        assert not runner.run(shared.enter("one", TIER, new_lease())).refused
        redis.client_kill_filter(_type="normal", skipme=True)  # what its end does to the connections that are kept


def test_what_redis_says_is_logged_once_a_minute(
    shared: RedisLimits,
    redis: Redis,
    runner: asyncio.Runner,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fundament.telemetry._said", {})
    redis.config_set("maxmemory", 1)
    try:
        with caplog.at_level("WARNING", logger="fundament"):
            for _ in range(3):
                with pytest.raises(UnavailableError):
                    runner.run(shared.enter("one", TIER, new_lease()))
    finally:
        redis.config_set("maxmemory", 0)
    [line] = [record for record in caplog.records if record.message == "limits failed"]
    assert "maxmemory" in str(line.fields["reason"])  # type: ignore[attr-defined]


def test_a_redis_that_hangs_is_waited_for_once(runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fundament.limits._MOST_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        limits = RedisLimits(f"redis://127.0.0.1:{hung.getsockname()[1]}")
        with pytest.raises(UnavailableError):
            runner.run(limits._lease("one", "lease", 1))
        runner.run(limits.close())
        hung.accept()[0].close()
        hung.setblocking(False)
        with pytest.raises(BlockingIOError):
            hung.accept()


def test_who_gives_up_at_the_door_does_not_run(shared: RedisLimits, redis: Redis, runner: asyncio.Runner) -> None:
    async def work() -> None:
        for n_steps in range(100):  # wherever it is by then
            entering = asyncio.ensure_future(shared.enter("one", TIER, lease := new_lease()))
            for _ in range(n_steps):
                await asyncio.sleep(0)
            if not entering.cancel():
                await shared.leave("one", lease)
            with suppress(asyncio.CancelledError):
                await entering
        async with asyncio.timeout(30):
            while shared._held or redis.zcard("fundament:one:leases"):
                await asyncio.sleep(0.01)

    runner.run(work())


def test_what_has_no_limit_is_not_counted(limits: Limits, runner: asyncio.Runner) -> None:
    async def work() -> None:
        for _ in range(5):
            entered = await limits.enter("one", Tier(), new_lease())
            spent = await limits.spend("one", Tier(), 10**12)
        assert (entered.refused, entered.n_running, entered.n_requests, entered.requests_seconds) == ("", 0, 0, 0)
        assert (spent.refused, spent.n_tokens, spent.tokens_seconds) == ("", 0, 0)

    runner.run(work())


class Brute:
    """All that was taken, looked at as a whole each time."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, int]] = []

    def last_minute(self, now: float) -> int:
        return sum(amount for at, amount in self.taken if at >= now - WINDOW_SECONDS)

    def clocks_minute(self, now: float) -> int:
        return sum(amount for at, amount in self.taken if at // WINDOW_SECONDS == now // WINDOW_SECONDS)


@given(steps)
def test_any_minute_holds_no_more_requests_than_the_limit(steps: list[tuple[float, int]]) -> None:
    async def work(clock: Clock) -> None:
        brute, tier, limits = Brute(), Tier(requests_per_minute=50), MemoryLimits()
        for seconds, n_requests in steps:
            clock.now += seconds
            for _ in range(n_requests):
                fits = brute.last_minute(clock.now) < 50
                standing = await limits.enter("one", tier, "")
                assert (not standing.refused) == fits
                if fits:
                    brute.taken.append((clock.now, 1))
                assert standing.n_requests == sum(at > clock.now - WINDOW_SECONDS for at, _ in brute.taken)
            if standing.refused:
                clock.now += standing.wait_seconds - MARGIN_SECONDS
                assert (await limits.enter("one", tier, "")).refused
                clock.now += MARGIN_SECONDS
                assert not (await limits.enter("one", tier, "")).refused
                brute.taken.append((clock.now, 1))

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(work(set_clock(patch)))


@given(steps)
def test_tokens_fit_after_the_wait_that_was_named_and_no_sooner(steps: list[tuple[float, int]]) -> None:
    async def work(clock: Clock) -> None:
        brute, tier, limits = Brute(), Tier(tokens_per_minute=50), MemoryLimits()
        for seconds, amount in steps:
            clock.now += seconds
            standing = await limits.spend("one", tier, amount)
            if amount > 50:
                assert (standing.refused, standing.wait_seconds) == ("tokens", WINDOW_SECONDS)
                continue
            if standing.refused:
                clock.now += standing.wait_seconds - MARGIN_SECONDS
                if standing.wait_seconds > MARGIN_SECONDS:
                    assert (await limits.spend("one", tier, amount)).refused
                clock.now += MARGIN_SECONDS
                standing = await limits.spend("one", tier, amount)
                assert not standing.refused
            brute.taken.append((clock.now, amount))
            assert brute.clocks_minute(clock.now) <= standing.n_tokens <= 50
            assert brute.last_minute(clock.now) <= 2 * 50
            clock.now += standing.tokens_seconds
            assert (await limits.spend("one", tier, 0)).n_tokens == 0
            clock.now -= standing.tokens_seconds

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(work(set_clock(patch)))


@given(
    previous=st.integers(0, 10**9),
    share=st.floats(0, 1),
    current=st.integers(0, 10**9),
    amount=st.integers(0, 10**9),
    limit=st.integers(1, 10**9),
)
def test_redis_counts_in_milliseconds(previous: int, share: float, current: int, amount: int, limit: int) -> None:
    def after(ms: int) -> SlidingWindow:
        """What the script of the library makes of it, some milliseconds later."""
        left = previous_ms - ms
        if left > 0:
            return SlidingWindow(previous, left / 1000, current, 60 + left / 1000)
        return SlidingWindow(current, max(0, 60_000 + left) / 1000, 0, 0)

    previous_ms = round(share * 59_999)
    wait_ms = round(1000 * after(0).wait(amount, limit))
    if amount > limit:
        assert wait_ms == 60_000
    else:
        assert after(wait_ms + 1).total + amount <= limit
        assert wait_ms <= 50 or after(wait_ms - 50).total + amount > limit


def test_a_wait_is_as_long_in_redis(shared: RedisLimits, redis: Redis, runner: asyncio.Runner) -> None:
    key = "fundament:{one:tokens:1000}"

    def passes(seconds: float) -> None:
        for name in (key, f"{key}/-1"):
            if (left := redis.pttl(name)) > 0:
                redis.pexpire(name, max(1, round(left - 1000 * seconds)))

    async def work() -> None:
        for amount, until_next in ((300, 45), (500, 45), (900, 15), (1_000, 30)):
            redis.flushdb()
            redis.set(f"{key}/-1", 900, px=1000 * until_next)
            redis.set(key, 200, px=1000 * (until_next + WINDOW_SECONDS))
            refused = await shared.spend("one", TIER, amount)
            assert refused.refused == "tokens"
            passes(refused.wait_seconds - 1)  # a second for the work in between
            assert (await shared.spend("one", TIER, amount)).refused == "tokens"
            passes(1)
            assert not (await shared.spend("one", TIER, amount)).refused

    runner.run(work())


def test_memory_counts_without_a_thread(runner: asyncio.Runner) -> None:
    async def work() -> None:
        limits = MemoryLimits()
        for _ in range(10):
            await limits.enter("one", TIER, "lease")
            await limits.spend("one", TIER, 1)
            assert not [thread for thread in threading.enumerate() if type(thread) is threading.Timer]

    runner.run(work())


def test_a_clock_that_is_set_back_locks_nobody_out(clock: Clock, runner: asyncio.Runner) -> None:
    async def work() -> None:
        limits = MemoryLimits()
        clock.now += 7_200
        tier = Tier(requests_per_minute=3, tokens_per_minute=100)
        for _ in range(3):
            assert not (await limits.enter("one", tier, "lease")).refused
        await limits.spend("one", tier, 100)
        clock.now -= 7_200
        assert (await limits.enter("one", tier, "lease")).refused
        limits.forget()
        assert not (await limits.enter("one", tier, "lease")).refused
        assert not (await limits.spend("one", tier, 100)).refused

    runner.run(work())


def test_memory_forgets_who_did_nothing_for_a_minute(
    clock: Clock, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        limits = MemoryLimits()
        for number in range(100):
            await limits.enter(str(number), TIER, "lease")
            await limits.spend(str(number), TIER, 1)
            await limits.leave(str(number), "lease")
        clock.now += 2 * WINDOW_SECONDS
        await limits.enter("new", TIER, "lease")
        monkeypatch.setattr("fundament.limits.WINDOW_SECONDS", 0.01)
        keeping = asyncio.ensure_future(limits.keep())
        async with asyncio.timeout(30):
            while len(limits._storage.events) > 1:
                await asyncio.sleep(0.01)
        keeping.cancel()
        assert list(limits._storage.events) == ["new:requests:100"]
        assert not limits._storage.storage
        assert not limits._storage.locks.keys() - limits._storage.events
        assert list(limits._running) == ["new"]

    runner.run(work())


def test_redis_forgets_by_its_own_clock(shared: RedisLimits, redis: Redis, runner: asyncio.Runner) -> None:
    async def work() -> None:
        now = redis.time()[0] * 1000
        redis.set("fundament:{one:tokens:1000}", 900, px=1000 * (WINDOW_SECONDS - 30))  # half of it counts
        redis.zadd("fundament:one:leases", {"dead": now - 1, "alive": now + 20_000})
        entered = await shared.enter("one", TIER, "mine")
        assert (entered.refused, entered.n_running) == ("", 1)
        assert 440 < entered.n_tokens <= 450
        assert redis.zrange("fundament:one:leases", 0, -1) == [b"alive", b"mine"]
        keys = set(redis.keys())
        assert len(keys) == 4
        assert all(redis.pttl(key) > 0 for key in keys)

    runner.run(work())


def test_a_request_whose_first_answer_was_lost_does_not_count_against_itself(
    shared: RedisLimits, runner: asyncio.Runner
) -> None:
    async def work() -> None:
        for _ in range(2):  # the client asks again by itself
            assert await shared._lease("one", "mine", 1) == 0
        assert await shared._lease("one", "another", 1) == 1

    runner.run(work())


def test_a_lease_in_redis_is_renewed_while_its_request_runs(
    shared: RedisLimits, redis: Redis, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundament.limits._RENEW_SECONDS", 0.01)

    async def work() -> None:
        for lease in ("mine", "dead"):
            await shared.enter("one", TIER, lease)
        redis.zrem("fundament:one:leases", "dead")
        first = redis.zscore("fundament:one:leases", "mine")
        keeping = asyncio.ensure_future(shared.keep())
        async with asyncio.timeout(30):
            while (redis.zscore("fundament:one:leases", "mine") or 0) <= (first or 0):
                await asyncio.sleep(0.01)
        keeping.cancel()
        assert redis.zrange("fundament:one:leases", 0, -1) == [b"mine"]  # what ran out stays out

    runner.run(work())


def test_a_redis_that_does_not_answer_is_unavailable(runner: asyncio.Runner) -> None:
    async def work() -> None:
        limits = RedisLimits("redis://127.0.0.1:1/0")
        with pytest.raises(UnavailableError, match="limits"):
            await limits.enter("one", TIER, "lease")
        assert not limits._held
        with pytest.raises(UnavailableError, match="limits"):
            await limits.spend("one", TIER, 1)
        await limits.close()

    runner.run(work())


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "redis://127.0.0.1:1/0?ssl_cert_reqs=none",
        "rediss://127.0.0.1:1/0?ssl_cert_reqs=foo",
        "redis://127.0.0.1:1/0?protocol=9",
        "redis://127.0.0.1:1/0?retry=3",
    ],
)
def test_a_url_that_is_none_or_has_an_option_that_is_none(url: str) -> None:
    with pytest.raises(FundamentError, match="redis_url"):
        RedisLimits(url)
