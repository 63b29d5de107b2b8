"""Balances that many spend at once, and usage that is written behind the answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.accounts.ledger import Ledger
from fundament.accounts.purse import Purse
from fundament.errors import UnavailableError
from fundament.store import keys, usage
from fundament.store.database import Database
from fundament.store.keys import Key
from fundament.store.usage import Line

DAY = date(2026, 2, 28)


async def make(store: Database, balance: int | None) -> Key:
    async with store.write() as connection:
        return (await keys.create(connection, "mine", tier="free", balance=balance))[0]


async def balance_of(store: Database, key: Key) -> int | None:
    async with store.read() as connection:
        found = await keys.get(connection, key.id)
    assert found is not None
    return found.balance


def test_a_purse_grants_exactly_what_is_there(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        purse, rich, poor = Purse(store), await make(store, 10**9), await make(store, 100)
        wishes = [purse.spend((rich if number % 2 else poor).id, 3) for number in range(200)]
        granted = await asyncio.gather(*wishes)
        assert sum(granted[1::2]) == 100
        assert sum(granted[::2]) == 33
        assert await balance_of(store, rich) == 10**9 - 300
        assert await balance_of(store, poor) == 1
        assert not await purse.spend("nobody", 1)

    runner.run(work())


def test_a_small_wish_passes_behind_one_that_is_too_large(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        purse, key = Purse(store), await make(store, 10)
        assert await asyncio.gather(*(purse.spend(key.id, n) for n in (4, 40, 5, 2))) == [True, False, True, False]
        assert await balance_of(store, key) == 1

    runner.run(work())


def test_a_wish_that_nobody_waits_for_does_not_stop_the_others(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        purse, key = Purse(store), await make(store, 10)
        tasks = [asyncio.ensure_future(purse.spend(key.id, 1)) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        assert await asyncio.gather(*tasks[1:]) == [True, True]
        assert await purse.spend(key.id, 1)

    runner.run(work())


def test_usage_is_written_before_a_second_is_over(
    store: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, sleep = list[float](), asyncio.sleep

    async def at_once(seconds: float) -> None:
        passed.append(seconds)
        await sleep(0)

    async def work() -> None:
        ledger, key = Ledger(store), await make(store, 10)
        monkeypatch.setattr("fundament.accounts.ledger.asyncio.sleep", at_once)
        keeping = asyncio.ensure_future(ledger.keep())
        for n in range(1, 4):
            ledger.refund(key.id, 1)
            async with asyncio.timeout(30):
                while await balance_of(store, key) != 10 + n:
                    pass
        keeping.cancel()
        await ledger.write()  # what may be under way ends
        assert max(passed) < 1

    runner.run(work())


def test_a_ledger_writes_on_when_its_caller_is_cancelled(
    store: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, settle = asyncio.Event(), keys.settle

    async def slow(*arguments: Any) -> None:
        begun.set()
        await asyncio.sleep(0.01)
        await settle(*arguments)

    async def work() -> None:
        ledger, key = Ledger(store), await make(store, 10)
        ledger.refund(key.id, 5)
        monkeypatch.setattr(keys, "settle", slow)
        leaving = asyncio.ensure_future(ledger.write())
        await begun.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        ledger.refund(key.id, 1)
        await ledger.write()
        assert await balance_of(store, key) == 16

    runner.run(work())


def test_what_was_written_though_its_answer_was_lost_is_not_written_again(
    store: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write

    @asynccontextmanager
    async def deaf() -> AsyncIterator[AsyncConnection]:
        async with write() as connection:
            yield connection
        raise UnavailableError("The store does not answer.")

    async def work() -> None:
        key, ledgers = await make(store, 10), [Ledger(store), Ledger(store)]
        for number, ledger in enumerate(ledgers):
            ledger.use(Line(key.id, DAY, "m", "/e"), n_requests=1, n_tokens=7)
            ledger.refund(key.id, 5)
            with monkeypatch.context() as patch:
                patch.setattr(store, "write", deaf)
                await ledger.write()
                await ledger.write()
            ledger.use(Line(key.id, DAY, "m", "/e"), n_requests=1, n_tokens=1)
            ledger.refund(key.id, 1)
            await ledger.write()
            await ledger.write()
            async with store.read() as connection:
                [used] = await usage.find(connection)
            assert (used.requests, used.tokens) == (2 * (number + 1), 8 * (number + 1))
            assert await balance_of(store, key) == 10 + 6 * (number + 1)

    runner.run(work())


def test_a_ledger_keeps_what_it_cannot_write(
    store: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise UnavailableError("away")

    async def work() -> None:
        ledger, key = Ledger(store), await make(store, 10)
        ledger.use(Line(key.id, DAY, "m", "/e"), n_requests=1, n_tokens=7)
        ledger.touch(key.id)
        ledger.refund(key.id, 5)
        with monkeypatch.context() as patch:
            patch.setattr(keys, "settle", fail)
            await ledger.write()
        assert await balance_of(store, key) == 10
        ledger.use(Line(key.id, DAY, "m", "/e"), n_requests=1, n_tokens=-3)
        ledger.refund(key.id, 1)
        await ledger.write()
        await ledger.write()
        async with store.read() as connection:
            [used] = await usage.find(connection)
            found = await keys.get(connection, key.id)
        assert (used.line.key_id, used.requests, used.tokens) == (key.id, 2, 4)
        assert found is not None
        assert found.balance == 16
        assert found.last_used_at is not None

    runner.run(work())
