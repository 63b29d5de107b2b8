"""How much a caller may do: requests and tokens of the last minute, and requests at once.

The `limits` library counts the minute, in memory or in a Redis that several processes share: requests in a moving
window, which remembers each of them, tokens in a sliding one, which keeps two sums and lets the older fade. Requests at
once, which it does not count, are leases.
"""

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from threading import Timer
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from limits.aio.storage import RedisStorage
from limits.storage import MemoryStorage

from fundament.config import Tier
from fundament.errors import FundamentError, UnavailableError, install
from fundament.telemetry import say_rarely

WINDOW_SECONDS = 60
_LEASE_SECONDS = 30  # after which the running requests of a process that died no longer count
_RENEW_SECONDS = 10
_MOST_SECONDS = 2.0  # that Redis may take for an answer
_TICK_SECONDS = 0.001  # what Redis counts in; a wait ends that much after its moment, not on it

Refused = Literal["", "concurrency", "requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a caller stands after asking for something.

    Attributes:
        refused: the limit that stood in the way; empty where none did.
        n_running: requests that ran already when this one asked to be let in.
        n_requests: requests of the last minute, this one included where it was let in.
        requests_seconds: until none of them counts any more, at most.
        n_tokens: tokens of the last minute, likewise.
        tokens_seconds: until none of them counts any more, at most.
        wait_seconds: until what was refused would fit, if nothing else came in between.
    """

    refused: Refused
    n_running: int
    n_requests: int
    requests_seconds: float
    n_tokens: int
    tokens_seconds: float
    wait_seconds: float


class SlidingWindow(NamedTuple):
    """The two sums of a sliding window, as the library gives them.

    Attributes:
        previous: the older sum, which fades.
        previous_seconds: until it has faded, at most one window's.
        current: the sum that grows, and fades once it is the older.
        current_seconds: until it has faded, at most two windows'.
    """

    previous: int
    previous_seconds: float
    current: int
    current_seconds: float

    @property
    def total(self) -> int:
        """What counts now."""
        return math.floor(self.previous * self.previous_seconds / WINDOW_SECONDS + self.current)

    @property
    def seconds(self) -> float:
        """Until nothing counts."""
        return self.current_seconds if self.current else self.previous_seconds

    def wait(self, amount: int, limit: int) -> float:
        """Seconds until `amount` fits, if nothing else comes in between; a whole window where it never does."""
        room = limit - amount
        if room < 0:
            return WINDOW_SECONDS
        if room < self.current:
            fading, seconds = self.current, self.current_seconds
        else:
            fading, seconds, room = self.previous, self.previous_seconds, room - self.current
        # With s seconds to go floor(fading * s / 60) counts, which fits once s < 60 * (room + 1) / fading.
        wait = seconds - WINDOW_SECONDS * (room + 1) / fading if fading else -1
        return wait + _TICK_SECONDS if wait >= 0 else 0


class Limits(ABC):
    """What counts callers. A limit of 0 is none, and what has no limit is not counted.

    `enter` and `spend` raise `UnavailableError` where Redis does not answer.
    """

    _storage: MemoryStorage | RedisStorage

    async def enter(self, who: str, tier: Tier, lease: str) -> Standing:
        """Begin a request, which `lease` names, unless too many run or came in the last minute."""
        limit, n_running = tier.requests_per_minute, 0
        refused: Refused = ""
        async with AsyncExitStack() as undo:  # a request that is not let in holds no lease, whatever the reason
            if tier.concurrency:
                undo.push_async_callback(self.leave, who, lease)
                n_running = await self._take(who, lease, tier.concurrency)
            if 0 < tier.concurrency <= n_running:
                refused = "concurrency"
            elif limit:
                key = _key(who, "requests", limit)
                (fits,) = await self._ask(self._storage.acquire_entry(key, limit, WINDOW_SECONDS))
                refused = "" if fits else "requests"
            standing = await self._standing(who, tier, refused, n_running=n_running)
            if not refused:
                undo.pop_all()
        return standing

    async def spend(self, who: str, tier: Tier, n_tokens: int) -> Standing:
        """Take tokens, unless that were too many for one minute."""
        limit, fits = tier.tokens_per_minute, True
        if limit:
            key = _key(who, "tokens", limit)
            (fits,) = await self._ask(self._storage.acquire_sliding_window_entry(key, limit, WINDOW_SECONDS, n_tokens))
        return await self._standing(who, tier, "" if fits else "tokens", n_tokens=n_tokens)

    @abstractmethod
    async def leave(self, who: str, lease: str) -> None:
        """End a request; once is enough, more do no harm."""

    @abstractmethod
    async def keep(self) -> None:
        """Forget what is over and hold what runs, for as long as this is awaited."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""

    @abstractmethod
    async def _take(self, who: str, lease: str, limit: int) -> int:
        """Hold a lease unless `limit` others are held; how many are."""

    @abstractmethod
    async def _ask(self, *answers: Any) -> Sequence[Any]:
        """What the storage answers: at once in memory, in one round trip from Redis."""

    async def _standing(
        self, who: str, tier: Tier, refused: Refused, *, n_running: int = 0, n_tokens: int = 0
    ) -> Standing:
        rate, limit = tier.requests_per_minute, tier.tokens_per_minute
        (first_at, n_requests), sums = await self._ask(
            self._storage.get_moving_window(_key(who, "requests", rate), rate, WINDOW_SECONDS),
            self._storage.get_sliding_window(_key(who, "tokens", limit), WINDOW_SECONDS),
        )
        tokens, wait_seconds = SlidingWindow(*sums), 0.0
        if refused == "concurrency":
            wait_seconds = 1
        elif refused == "requests":  # which may fit by now
            first_seconds = first_at + WINDOW_SECONDS - time.time() if n_requests >= rate else 0
            wait_seconds = max(0, first_seconds) + _TICK_SECONDS
        elif refused == "tokens":
            wait_seconds = tokens.wait(n_tokens, limit)
        requests_seconds = WINDOW_SECONDS if n_requests else 0
        return Standing(refused, n_running, n_requests, requests_seconds, tokens.total, tokens.seconds, wait_seconds)


class _Resting(Timer):
    """A timer that seems to run, so that a storage starts no other."""

    def is_alive(self) -> bool:
        return True


class MemoryLimits(Limits):
    """Limits of one process."""

    _storage: MemoryStorage

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        # After a hit the storage has a thread walk all callers, up to a hundred times a second. `keep` does it once a
        # minute, on the event loop, where nothing else touches them.
        self._storage.timer.cancel()
        self._storage.timer.join()
        self._storage.timer = _Resting(WINDOW_SECONDS, self._storage.timer.function)
        self._running: dict[str, set[str]] = {}

    async def leave(self, who: str, lease: str) -> None:
        """End a request."""
        if running := self._running.get(who):
            running.discard(lease)
            if not running:
                del self._running[who]

    async def keep(self) -> None:
        """Forget callers that did nothing for a minute."""
        while True:
            await asyncio.sleep(WINDOW_SECONDS)
            self.forget()

    def forget(self) -> None:
        """Forget what no longer counts."""
        self._storage.timer.function()
        now = time.time()
        for key, entries in list(self._storage.events.items()):
            # The storage would remember callers without requests for good, and what came while the clock was ahead for
            # as long as it was.
            if not entries or entries[0].atime > now + 1:
                self._storage.clear(key)
        for key, expiry in list(self._storage.expirations.items()):
            if expiry > now + 3 * WINDOW_SECONDS:
                self._storage.clear(key)

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _take(self, who: str, lease: str, limit: int) -> int:
        running = self._running.setdefault(who, set())
        n_running = len(running)
        if n_running < limit:
            running.add(lease)
        return n_running

    async def _ask(self, *answers: Any) -> Sequence[Any]:
        return answers


# Redis' own clock counts, so that processes need not agree on the time. A lease that is held is renewed, and does not
# count against itself: the client asks again where an answer was lost.
_TAKE = """
local leases, lease, limit, lasts = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
local running, mine = redis.call('ZCARD', leases), redis.call('ZSCORE', leases, lease)
if mine then running = running - 1 end
if mine or running < limit then
  redis.call('ZADD', leases, now + lasts, lease)
  redis.call('PEXPIRE', leases, lasts)
end
return running
"""


class RedisLimits(Limits):
    """Limits that all processes with the same Redis share.

    A running request holds a lease there, which its process renews; those of a process that died run out.

    Args:
        url: `redis://…`, `rediss://…` or `unix://…`.
    """

    def __init__(self, url: str) -> None:
        try:
            from redis import asyncio as client
            from redis import exceptions as client_errors
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ModuleNotFoundError as error:
            raise FundamentError(f"Limits in Redis need its client: {install('redis')}") from error
        try:
            # Once more at once: a kept connection does not know that Redis was started anew. Not where it hangs.
            again = Retry(NoBackoff(), 1, supported_errors=(client_errors.ConnectionError,))
            pool = client.BlockingConnectionPool.from_url(
                url, max_connections=64, timeout=_MOST_SECONDS, socket_timeout=_MOST_SECONDS, retry=again
            )
            pool.connection_class(**pool.connection_kwargs)  # which the options of the URL are for
        except (AttributeError, TypeError, ValueError, client_errors.RedisError) as error:
            raise FundamentError(f"redis_url is not a URL of Redis: {error}") from error
        self._storage = RedisStorage(
            "redis://",  # what the pool connects to
            implementation="redispy",
            key_prefix="fundament",
            connection_pool=pool,  # type: ignore[arg-type]  # it names the simple options only
        )
        self._error = client_errors.RedisError
        self._redis = client.Redis.from_pool(pool)  # which it closes
        self._script = self._redis.register_script(_TAKE)
        self._held: dict[str, str] = {}  # by lease, whose it is

    async def leave(self, who: str, lease: str) -> None:
        """End a request; a lease that Redis does not hear of runs out."""
        if self._held.pop(lease, None):
            with suppress(self._error):
                await self._redis.zrem(_leases(who), lease)

    async def keep(self) -> None:
        """Renew the leases of what runs; before that, look whether Redis answers at all, which the log tells."""
        with suppress(UnavailableError):
            await self._ask(self._redis.ping())
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            for lease, who in list(self._held.items()):
                with suppress(UnavailableError):
                    await self._lease(who, lease, 0)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _take(self, who: str, lease: str, limit: int) -> int:
        self._held[lease] = who  # first, so that one that is given up halfway is let go of
        n_running = await self._lease(who, lease, limit)
        if n_running >= limit:
            del self._held[lease]
        return n_running

    async def _lease(self, who: str, lease: str, limit: int) -> int:
        (n_running,) = await self._ask(self._script([_leases(who)], [lease, limit, 1000 * _LEASE_SECONDS]))
        return int(n_running)

    async def _ask(self, *answers: Any) -> Sequence[Any]:
        try:
            return await asyncio.gather(*answers)
        except self._error as error:
            say_rarely("limits failed", reason=error)
            raise UnavailableError("The limits cannot be read. Try again shortly.") from error


def limits_of(redis_url: str) -> Limits:
    """Limits in Redis where there is a URL, in memory otherwise.

    Raises:
        FundamentError: the client for Redis is not installed, or the URL is none.
    """
    return RedisLimits(redis_url) if redis_url else MemoryLimits()


def new_lease() -> str:
    """A name for a running request."""
    return uuid4().hex


def _key(who: str, what: str, limit: int) -> str:
    """Where a window is kept; another limit begins its own."""
    return f"{who}:{what}:{limit}"


def _leases(who: str) -> str:
    return f"fundament:{who}:leases"
