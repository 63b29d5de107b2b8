"""How much a caller may do: requests and tokens of the last minute, and requests at once.

A window is exact: it remembers each entry of the last sixty seconds with its amount. One process counts for itself in
memory; several count together in Redis, in one round trip for a request's entry and one for its tokens.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from uuid import uuid4

from fundament.config import Tier
from fundament.errors import FundamentError, UnavailableError

WINDOW_SECONDS = 60
_LEASE_SECONDS = 30  # after which the running requests of a process that died no longer count
_RENEW_SECONDS = 10

Refused = Literal["", "concurrency", "requests", "tokens"]


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a caller stands after asking for something.

    Attributes:
        refused: the limit that stood in the way; empty where none did.
        n_running: requests at once, this one included where it may run.
        n_requests: requests of the last minute, likewise.
        requests_seconds: until none of them counts any more.
        n_tokens: tokens of the last minute, likewise.
        tokens_seconds: until none of them counts any more.
        wait_seconds: until what was refused would fit, if nothing else came in between.
    """

    refused: Refused
    n_running: int
    n_requests: int
    requests_seconds: float
    n_tokens: int
    tokens_seconds: float
    wait_seconds: float


class Limits(Protocol):
    """What counts callers. A limit of 0 is none, and what has no limit is not counted."""

    async def enter(self, who: str, tier: Tier, lease: str) -> Standing:
        """Begin a request, which `lease` names, unless too many run or came in the last minute."""
        ...

    async def spend(self, who: str, tier: Tier, n_tokens: int) -> Standing:
        """Take tokens, unless that were too many for one minute."""
        ...

    async def leave(self, who: str, lease: str) -> None:
        """End a request."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def limits_of(redis_url: str) -> Limits:
    """Limits in Redis where there is a URL, in memory otherwise.

    Raises:
        FundamentError: the client for Redis is not installed, or the URL is none.
    """
    return RedisLimits(redis_url) if redis_url else MemoryLimits()


@dataclass(slots=True)
class Window:
    """What was taken in the last minute: when, and how much."""

    entries: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0

    def settle(self, now: float) -> None:
        """Forget what is older."""
        while self.entries and self.entries[0][0] <= now - WINDOW_SECONDS:
            self.total -= self.entries.popleft()[1]

    def add(self, now: float, amount: int) -> None:
        """Take an amount."""
        self.entries.append((now, amount))
        self.total += amount

    def seconds(self, now: float) -> float:
        """Until it is empty."""
        return self.entries[-1][0] + WINDOW_SECONDS - now if self.entries else 0

    def wait(self, now: float, amount: int, limit: int) -> float:
        """Seconds until `amount` fits; a whole window where it never does."""
        excess = self.total + amount - limit
        for at, taken in self.entries:
            excess -= taken
            if excess <= 0:
                return at + WINDOW_SECONDS - now
        return WINDOW_SECONDS


@dataclass(slots=True)
class _Book:
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    leases: set[str] = field(default_factory=set)

    def settle(self, now: float) -> None:
        self.requests.settle(now)
        self.tokens.settle(now)

    def standing(self, now: float, refused: Refused = "", wait_seconds: float = 0) -> Standing:
        return Standing(
            refused,
            len(self.leases),
            self.requests.total,
            self.requests.seconds(now),
            self.tokens.total,
            self.tokens.seconds(now),
            wait_seconds,
        )


class MemoryLimits:
    """Limits of one process.

    Args:
        clock: seconds, of any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._books: dict[str, _Book] = {}
        self._sweep_at = clock() + WINDOW_SECONDS

    async def enter(self, who: str, tier: Tier, lease: str) -> Standing:
        """Begin a request."""
        book, now = self._open(who)
        if tier.concurrency and len(book.leases) >= tier.concurrency:
            return book.standing(now, "concurrency", 1)
        if tier.requests_per_minute:
            if book.requests.total >= tier.requests_per_minute:
                return book.standing(now, "requests", book.requests.wait(now, 1, tier.requests_per_minute))
            book.requests.add(now, 1)
        if tier.concurrency:
            book.leases.add(lease)
        return book.standing(now)

    async def spend(self, who: str, tier: Tier, n_tokens: int) -> Standing:
        """Take tokens."""
        book, now = self._open(who)
        if tier.tokens_per_minute:
            if book.tokens.total + n_tokens > tier.tokens_per_minute:
                return book.standing(now, "tokens", book.tokens.wait(now, n_tokens, tier.tokens_per_minute))
            book.tokens.add(now, n_tokens)
        return book.standing(now)

    async def leave(self, who: str, lease: str) -> None:
        """End a request."""
        if book := self._books.get(who):
            book.leases.discard(lease)

    async def close(self) -> None:
        """Nothing to let go of."""

    def _open(self, who: str) -> tuple[_Book, float]:
        now = self._clock()
        if now >= self._sweep_at:
            self._sweep(now)
        book = self._books.setdefault(who, _Book())
        book.settle(now)
        return book, now

    def _sweep(self, now: float) -> None:
        """Forget callers that did nothing for a minute."""
        self._sweep_at = now + WINDOW_SECONDS
        for who, book in list(self._books.items()):
            book.settle(now)
            if not (book.requests.entries or book.tokens.entries or book.leases):
                del self._books[who]


# An entry is `milliseconds:amount`. Redis' own clock counts, so that processes need not agree on the time.
_SCRIPT = """
local requests, tokens, total, leases = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local window = 60000
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function read(entry)
  local colon = string.find(entry, ':', 1, true)
  return tonumber(string.sub(entry, 1, colon - 1)), tonumber(string.sub(entry, colon + 1))
end
local function settle(list, sum)
  local entry = redis.call('LINDEX', list, 0)
  while entry do
    local at, amount = read(entry)
    if at > now - window then return end
    redis.call('LPOP', list)
    if sum then redis.call('DECRBY', sum, amount) end
    entry = redis.call('LINDEX', list, 0)
  end
end
local function until_empty(list)
  local entry = redis.call('LINDEX', list, -1)
  return entry and read(entry) + window - now or 0
end
local function wait(list, excess)
  for _, entry in ipairs(redis.call('LRANGE', list, 0, -1)) do
    local at, amount = read(entry)
    excess = excess - amount
    if excess <= 0 then return at + window - now end
  end
  return window
end
local function standing(refused, waits)
  return {refused, redis.call('ZCARD', leases), redis.call('LLEN', requests), until_empty(requests),
    tonumber(redis.call('GET', total) or 0), until_empty(tokens), waits}
end
settle(requests)
settle(tokens, total)
redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
"""
_ENTER = (
    _SCRIPT
    + """
local rate, at_once, lease, lasts = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
if at_once > 0 and redis.call('ZCARD', leases) >= at_once then return standing('concurrency', 1000) end
if rate > 0 then
  local n = redis.call('LLEN', requests)
  if n >= rate then return standing('requests', wait(requests, n + 1 - rate)) end
  redis.call('RPUSH', requests, now .. ':1')
  redis.call('PEXPIRE', requests, window)
end
if at_once > 0 then
  redis.call('ZADD', leases, now + lasts, lease)
  redis.call('PEXPIRE', leases, lasts)
end
return standing('', 0)
"""
)
_SPEND = (
    _SCRIPT
    + """
local rate, amount = tonumber(ARGV[1]), tonumber(ARGV[2])
if rate > 0 then
  local taken = tonumber(redis.call('GET', total) or 0)
  if taken + amount > rate then return standing('tokens', wait(tokens, taken + amount - rate)) end
  redis.call('RPUSH', tokens, now .. ':' .. amount)
  redis.call('INCRBY', total, amount)
  redis.call('PEXPIRE', tokens, window)
  redis.call('PEXPIRE', total, window)
end
return standing('', 0)
"""
)
_RENEW = """
local time = redis.call('TIME')
local expires = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[1])
for index = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', expires, ARGV[index]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""


class RedisLimits:
    """Limits that all processes with the same Redis share.

    A running request holds a lease there, which its process renews; those of a process that died run out.

    Args:
        url: `redis://…`, `rediss://…` or `unix://…`.
    """

    def __init__(self, url: str) -> None:
        try:
            from redis import asyncio as client
            from redis.exceptions import RedisError
        except ModuleNotFoundError as error:
            raise FundamentError("Limits in Redis need its client: pip install 'fundament[redis]'.") from error
        try:
            pool = client.BlockingConnectionPool.from_url(url, max_connections=64, timeout=5, socket_timeout=5)
        except ValueError as error:
            raise FundamentError(f"redis_url is not a URL of Redis: {error}") from error
        self._error = RedisError
        self._redis = client.Redis.from_pool(pool)  # which it closes
        self._enter, self._spend, self._renew = map(self._redis.register_script, (_ENTER, _SPEND, _RENEW))
        self._held: dict[str, set[str]] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def enter(self, who: str, tier: Tier, lease: str) -> Standing:
        """Begin a request."""
        arguments = (tier.requests_per_minute, tier.concurrency, lease, _LEASE_SECONDS * 1000)
        standing = await self._ask(self._enter, who, *arguments)
        if tier.concurrency and not standing.refused:
            self._held.setdefault(who, set()).add(lease)
            self._renewal = self._renewal or asyncio.ensure_future(self._renew_held())
        return standing

    async def spend(self, who: str, tier: Tier, n_tokens: int) -> Standing:
        """Take tokens."""
        return await self._ask(self._spend, who, tier.tokens_per_minute, n_tokens)

    async def leave(self, who: str, lease: str) -> None:
        """End a request; a lease that Redis does not hear of runs out."""
        if lease not in (held := self._held.get(who, set())):
            return
        held.discard(lease)
        if not held:
            del self._held[who]
        with suppress(self._error):
            await self._redis.zrem(_keys(who)[-1], lease)

    async def close(self) -> None:
        """Close the connections."""
        if self._renewal is not None:
            self._renewal.cancel()
        await self._redis.aclose()

    async def _ask(self, script: Any, who: str, *arguments: object) -> Standing:
        try:
            refused, n_running, n_requests, requests_ms, n_tokens, tokens_ms, wait_ms = await script(
                keys=_keys(who), args=arguments
            )
        except self._error as error:
            raise UnavailableError("The limits cannot be read. Try again shortly.") from error
        return Standing(
            refused.decode(), n_running, n_requests, requests_ms / 1000, n_tokens, tokens_ms / 1000, wait_ms / 1000
        )

    async def _renew_held(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            for who, held in list(self._held.items()):
                with suppress(self._error):
                    await self._renew(keys=[_keys(who)[-1]], args=[_LEASE_SECONDS * 1000, *held])


def _keys(who: str) -> list[str]:
    """A caller's keys; the braces keep them on one node of a cluster."""
    return [f"fundament:{{{who}}}:{name}" for name in ("requests", "tokens", "total", "leases")]


def new_lease() -> str:
    """A name for a running request."""
    return uuid4().hex
