"""A caller's request from its entry to its end: limits, balance and usage of what it runs."""

import asyncio
import ipaddress
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import lru_cache

from fundament.accounts.keyring import Keyring
from fundament.accounts.ledger import Ledger
from fundament.accounts.purse import Purse
from fundament.config import Settings, Tier
from fundament.core import Bill
from fundament.errors import AuthError, BalanceError, LimitError
from fundament.limits import Limits, Standing, new_lease
from fundament.store.database import Database
from fundament.store.keys import Key
from fundament.store.usage import Line

NO_LIMITS = Tier()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        id: what limits and fairness go by: a key's id, or an address where no keys are asked for.
        tier: the limits.
        key: None where no keys are asked for.
    """

    id: str
    tier: Tier = NO_LIMITS
    key: Key | None = None

    @property
    def key_id(self) -> str:
        """The key's id; empty without one."""
        return self.key.id if self.key else ""

    @property
    def admin(self) -> bool:
        """Whether the key manages the others."""
        return self.key is not None and self.key.admin


@dataclass(slots=True)
class Visit:
    """One request of a caller.

    Attributes:
        caller: whose.
        endpoint: what usage is counted under, known once the request is routed.
        standing: what is left of the caller's limits; None where there are none.
    """

    accounts: "Accounts"
    caller: Caller
    endpoint: Callable[[], str]
    standing: Standing | None = None
    lease: str = ""
    day: date = field(default_factory=lambda: datetime.now(UTC).date())  # of its usage, what is given back included
    _taken: dict[str, int] = field(default_factory=dict)  # tokens of each model, less what was given back

    def bill(self, model: str) -> Bill:
        """What pays for a call of that model."""
        return _VisitBill(self, model)

    async def leave(self) -> None:
        """End the request; once is enough, more do no harm."""
        if self.lease:
            lease, self.lease = self.lease, ""
            await self.accounts.limits.leave(self.caller.id, lease)

    async def charge(self, model: str, n_tokens: int) -> None:
        """Take the tokens of a call from the minute and from the balance, and note them.

        Raises:
            LimitError: too many tokens for one minute.
            BalanceError: more than the key has left.
        """
        accounts, caller = self.accounts, self.caller
        if caller.tier.tokens_per_minute:
            self.standing = await accounts.limits.spend(caller.id, caller.tier, n_tokens)
            if self.standing.refused:
                raise _too_many_tokens(self.standing, caller, n_tokens)
        if caller.key is not None and caller.key.balance is not None and n_tokens:
            await self._pay(caller.key, n_tokens)
        self._note(model, n_tokens)

    def forgive(self) -> None:
        """Give back all that was taken: nobody gets anything for it."""
        for model, n_tokens in self._taken.items():
            self.refund(model, n_tokens)

    def refund(self, model: str, n_tokens: int) -> None:
        """Give tokens back to the balance, no more than were taken; the minute's stay taken."""
        if n_tokens := min(n_tokens, self._taken.get(model, 0)):
            if self.caller.key is not None and self.caller.key.balance is not None:
                self.accounts.ledger.refund(self.caller.key.id, n_tokens)
            self._note(model, -n_tokens)

    async def _pay(self, key: Key, n_tokens: int) -> None:
        paying = asyncio.ensure_future(self.accounts.purse.spend(key.id, n_tokens))
        try:
            paid = await asyncio.shield(paying)
        except asyncio.CancelledError:
            # The payment goes on, and nobody waits for what it is for.
            paying.add_done_callback(lambda done: self._give_back(key, n_tokens, done))
            raise
        if not paid:
            raise BalanceError(
                f"Insufficient account balance: this request needs {n_tokens:,} tokens. "
                f"Top it up: fundament keys credit {key.id} TOKENS"
            )

    def _give_back(self, key: Key, n_tokens: int, paying: asyncio.Future[bool]) -> None:
        if not paying.cancelled() and paying.exception() is None and paying.result():
            self.accounts.ledger.refund(key.id, n_tokens)

    def _note(self, model: str, n_tokens: int) -> None:
        first = model not in self._taken
        self._taken[model] = self._taken.get(model, 0) + n_tokens
        line = Line(self.caller.key_id, self.day, model, self.endpoint())
        self.accounts.ledger.use(line, n_requests=int(first), n_tokens=n_tokens)


@dataclass(frozen=True, slots=True)
class _VisitBill:
    visit: Visit
    model: str

    async def admit(self, n_tokens: int) -> None:
        await self.visit.charge(self.model, n_tokens)

    def refund(self, n_tokens: int) -> None:
        self.visit.refund(self.model, n_tokens)


current_visit: ContextVar[Visit | None] = ContextVar("current_visit", default=None)
"""The request that runs; what it asks of a model is billed to it."""


class Accounts:
    """Keys, limits, balances and usage of one process.

    Args:
        store: what survives a restart.
        limits: what counts the last minute.
        settings: whether keys are asked for, and the tiers.
    """

    def __init__(self, store: Database, limits: Limits, settings: Settings) -> None:
        self.limits, self.settings = limits, settings
        self.keyring, self.purse, self.ledger = Keyring(store), Purse(store), Ledger(store)
        self._anonymous = Tier(
            requests_per_minute=settings.ip_requests_per_minute,
            tokens_per_minute=settings.ip_tokens_per_minute,
            concurrency=settings.ip_concurrency,
        )
        self._refusals = Tier(requests_per_minute=settings.ip_refusals_per_minute)

    async def recognise(self, authorization: str | None, address: str, *, admin: bool) -> Caller:
        """Who asks.

        Args:
            authorization: the header.
            address: where the request comes from.
            admin: whether an admin's key is wanted, even where no keys are asked for.

        Raises:
            AuthError: a key is needed, and there is none that works.
            LimitError: too many keys from that address did not work.
        """
        if not (admin or self.settings.auth):
            return Caller(f"ip:{_network(address)}", self._anonymous)
        try:
            key = await self.keyring.open(authorization, admin=admin)
        except AuthError:
            await self._count_refusal(address)
            raise
        self.ledger.touch(key.id)
        return Caller(key.id, self.tier_of(key), key)

    def tier_of(self, key: Key) -> Tier:
        """The limits of a key. A tier that the settings no longer know allows what the least does, not everything."""
        return self.settings.tier(key.tier) or self.settings.tier("free") or NO_LIMITS

    async def enter(self, visit: Visit) -> None:
        """Begin a request.

        Raises:
            LimitError: too many run already, or came in the last minute.
        """
        caller, tier = visit.caller, visit.caller.tier
        if tier == NO_LIMITS:
            return
        lease = new_lease() if tier.concurrency else ""
        visit.standing = standing = await self.limits.enter(caller.id, tier, lease)
        if standing.refused == "concurrency":
            raise LimitError(
                "RATE_CONCURRENCY_LIMIT_EXCEEDED",
                f"Concurrency limit exceeded: {standing.n_running}/{tier.concurrency} concurrent requests. "
                "Wait for pending requests to complete before sending new ones.",
                retry_after_seconds=1,
            )
        if standing.refused and caller.key is None:
            raise _ip_refused(standing)
        if standing.refused:
            raise LimitError(
                "RATE_REQUEST_LIMIT_EXCEEDED",
                f"Request rate limit exceeded: {standing.n_requests}/{tier.requests_per_minute} requests per minute. "
                "Reduce request frequency, or ask for a key of a larger tier.",
                retry_after_seconds=_whole(standing.wait_seconds),
            )
        visit.lease = lease

    async def close(self) -> None:
        """Write what is not yet written, and let go of connections."""
        await self.ledger.write()
        await self.limits.close()

    async def _count_refusal(self, address: str) -> None:
        if self._refusals != NO_LIMITS:
            standing = await self.limits.enter(f"refused:{_network(address)}", self._refusals, "")
            if standing.refused:
                raise _ip_refused(standing)


@lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """What stands for one client: an address, of IPv6 the network that a client has to itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            return str(ipaddress.ip_network((found, 64), strict=False).network_address)
        found = found.ipv4_mapped
    return str(found)


def _ip_refused(standing: Standing) -> LimitError:
    return LimitError(
        "RATE_IP_LIMIT_EXCEEDED",
        "IP rate limit exceeded. Too many requests from this IP address. Reduce request frequency.",
        retry_after_seconds=_whole(standing.wait_seconds),
    )


def _too_many_tokens(standing: Standing, caller: Caller, n_tokens: int) -> LimitError:
    limit = caller.tier.tokens_per_minute
    way_out = "Send less at once, or ask for a key of a larger tier." if caller.key else "Send less at once."
    if n_tokens > limit:
        way_out = f"This request alone has {n_tokens:,}, and no wait will do. {way_out}"
    return LimitError(
        "RATE_TOKEN_LIMIT_EXCEEDED",
        f"Token rate limit exceeded: {standing.n_tokens:,}/{limit:,} tokens per minute. {way_out}",
        retry_after_seconds=_whole(standing.wait_seconds),
        is_final=n_tokens > limit,
    )


def _whole(seconds: float) -> int:
    return max(1, math.ceil(seconds))
