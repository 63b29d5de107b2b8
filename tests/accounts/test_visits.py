"""What a request pays when it does not end as it should."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from fundament.accounts.visits import Accounts, Caller, Visit
from fundament.config import Settings, Tier
from fundament.errors import LimitError
from fundament.limits import MemoryLimits
from fundament.store import keys, usage
from fundament.store.database import Database
from fundament.store.keys import Key


@dataclass
class Desk:
    """A store with one key of 100 tokens, and a process's accounts."""

    store: Database
    accounts: Accounts
    key: Key

    def visit(self, tier: Tier = Tier()) -> Visit:  # noqa: B008 - it is frozen
        return Visit(self.accounts, Caller(self.key.id, tier, self.key), lambda: "/e")

    async def settled(self) -> tuple[int | None, list[tuple[str, int, int]]]:
        """The balance, and usage by model, once all is written."""
        await self.accounts.ledger.write()
        async with self.store.read() as connection:
            key, used = await keys.get(connection, self.key.id), await usage.find(connection)
        assert key is not None
        return key.balance, [(use.line.model, use.requests, use.tokens) for use in used]


@pytest.fixture
def desk(store: Database, runner: asyncio.Runner, tmp_path: Path) -> Iterator[Desk]:
    async def make() -> Key:
        async with store.write() as connection:
            return (await keys.create(connection, "mine", tier="free", balance=100))[0]

    accounts = Accounts(store, MemoryLimits(), Settings(data_dir=tmp_path, auth=True))
    yield Desk(store, accounts, runner.run(make()))
    runner.run(accounts.close())


def test_calls_of_one_request_are_one_request(desk: Desk, runner: asyncio.Runner) -> None:
    async def work() -> None:
        visit = desk.visit()
        for model, n_tokens in (("a", 10), ("a", 5), ("b", 1)):
            await visit.bill(model).admit(n_tokens)
        visit.bill("a").refund(2)
        assert await desk.settled() == (86, [("a", 1, 13), ("b", 1, 1)])

    runner.run(work())


def test_a_request_that_fails_later_gets_all_back(desk: Desk, runner: asyncio.Runner) -> None:
    async def work() -> None:
        visit = desk.visit(Tier(tokens_per_minute=20))
        await visit.bill("a").admit(15)
        visit.bill("a").refund(5)
        with pytest.raises(LimitError):
            await visit.bill("a").admit(20)
        for _ in range(2):  # twice is once
            visit.forgive()
        visit.bill("a").refund(10)  # of a call that was still under way
        assert await desk.settled() == (100, [("a", 1, 0)])

    runner.run(work())


def test_what_is_given_back_after_midnight_is_of_the_day_before(desk: Desk, runner: asyncio.Runner) -> None:
    async def work() -> None:
        visit = desk.visit()
        visit.day -= timedelta(days=1)
        await visit.bill("a").admit(10)
        assert await desk.settled() == (90, [("a", 1, 10)])
        visit.forgive()
        assert await desk.settled() == (100, [("a", 1, 0)])

    runner.run(work())


def test_a_payment_that_nobody_waits_for_is_given_back(
    desk: Desk, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        held, spend = asyncio.Event(), desk.accounts.purse.spend

        async def slow(key_id: str, n_tokens: int) -> bool:
            await held.wait()
            return await spend(key_id, n_tokens)

        monkeypatch.setattr(desk.accounts.purse, "spend", slow)
        paying = asyncio.ensure_future(desk.visit().bill("a").admit(40))
        await asyncio.sleep(0)
        paying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await paying
        held.set()
        async with asyncio.timeout(30):
            while not desk.accounts.ledger._entry.refunds:
                await asyncio.sleep(0.001)
        assert await desk.settled() == (100, [])

    runner.run(work())
