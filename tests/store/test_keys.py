"""Keys: made, proved, ended; and their balance, which many spend at once."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from fundament.errors import UnavailableError
from fundament.store import keys
from fundament.store.database import Database, locate
from fundament.store.keys import Key


async def make(store: Database, **fields: object) -> tuple[Key, str]:
    async with store.write() as connection:
        return await keys.create(connection, "mine", tier="free", **fields)  # type: ignore[arg-type]


def test_a_key_is_shown_once_and_proved_by_its_digest(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        key, shown = await make(store, admin=True, expires_at=datetime.now(UTC) + timedelta(days=1))
        assert len(shown) == 65
        assert shown.startswith("jina_")
        assert shown.isascii()
        assert shown[5:].isalnum()
        found = keys.split(shown)
        assert found is not None
        key_id, secret = found
        async with store.read() as connection:
            kept = await keys.get(connection, key_id)
            [row] = await connection.execute(text("SELECT * FROM keys"))
        assert kept == key
        assert kept.proves(secret)
        assert not kept.proves(secret[::-1])
        assert all(secret not in str(value) for value in row)
        assert kept.created_at.tzinfo is not None

    runner.run(work())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "jina_",
        "jina_" + "a" * 59,
        "jina_" + "a" * 61,
        "JINA_" + "a" * 60,
        "a" * 65,
        "jina_" + "a" * 59 + "é",
        "jina_" + "a" * 59 + "'",
        "jina_" + "%" * 60,
        "jina_" + "../" * 20,
    ],
)
def test_what_has_not_the_form_of_a_key(text: str) -> None:
    assert keys.split(text) is None


def test_a_key_ends_when_it_is_revoked_or_its_time_is_over(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        now = datetime.now(UTC)
        key, _ = await make(store, expires_at=now + timedelta(hours=1))
        assert key.state(now) == "active"
        assert key.state(now + timedelta(hours=1)) == "expired"
        async with store.write() as connection:
            revoked = await keys.revoke(connection, key.id)
            again = await keys.revoke(connection, key.id)
            assert await keys.revoke(connection, "nobody") is None
            assert await keys.rotate(connection, key.id) is None
        assert revoked == again
        assert revoked is not None
        assert revoked.state(now) == "revoked"

    runner.run(work())


def test_a_rotated_key_has_a_new_secret_only(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        key, shown = await make(store, balance=7)
        async with store.write() as connection:
            rotated = await keys.rotate(connection, key.id)
        assert rotated is not None
        new, shown_again = rotated
        assert new.id == key.id
        assert new.balance == 7
        assert shown_again != shown
        for each, right in ((shown, False), (shown_again, True)):
            found = keys.split(each)
            assert found is not None
            assert new.proves(found[1]) is right

    runner.run(work())


def test_a_changed_key_is_otherwise_the_same(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        key, _ = await make(store, balance=7, expires_at=datetime.now(UTC) + timedelta(days=1))
        other, _ = await make(store)
        async with store.write() as connection:
            changed = await keys.change(connection, key.id, {"tier": "tier2", "expires_at": None})
            assert changed == replace(key, tier="tier2", expires_at=None)
            assert await keys.get(connection, key.id) == changed
            assert await keys.get(connection, other.id) == other
            await keys.revoke(connection, key.id)
            assert await keys.change(connection, key.id, {"tier": "free"}) is None
            assert await keys.change(connection, "nobody", {"tier": "free"}) is None

    runner.run(work())


def test_a_balance_is_never_overdrawn_by_many_at_once(store: Database, runner: asyncio.Runner) -> None:
    async def spend(key: Key) -> bool:
        async with store.write() as connection:
            return await keys.spend(connection, key.id, 3)

    async def work() -> None:
        key, _ = await make(store, balance=32)
        taken = await asyncio.gather(*(spend(key) for _ in range(40)))
        assert sum(taken) == 10
        async with store.write() as connection:
            left = await keys.credit(connection, key.id, 5)
            uncounted, _ = await keys.create(connection, "free", tier="free")
            assert await keys.credit(connection, uncounted.id, 5) is None
            assert not await keys.spend(connection, uncounted.id, 5)
        assert left is not None
        assert left.balance == 32 - 30 + 5

    runner.run(work())


def test_the_last_use_and_refunds_are_noted(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        (one, _), (two, _) = await make(store, balance=1), await make(store)
        now = datetime.now(UTC)
        async with store.write() as connection:
            await keys.settle(connection, {two.id: now}, {one.id: 5, two.id: 5})
            listed = await keys.everyone(connection)
        assert [key.id for key in listed] == [one.id, two.id]
        assert [key.last_used_at for key in listed] == [None, now]
        assert [key.balance for key in listed] == [6, None]

    runner.run(work())


def test_a_transaction_that_raises_leaves_nothing(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        key, _ = await make(store, balance=10)
        with pytest.raises(RuntimeError):
            async with store.write() as connection:
                assert await keys.spend(connection, key.id, 4)
                raise RuntimeError
        async with store.read() as connection:
            assert await keys.get(connection, key.id) == key

    runner.run(work())


def test_a_store_that_does_not_answer_is_unavailable(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def work() -> None:
        gone = Database(locate("postgresql://nobody@127.0.0.1:1/none", tmp_path))
        with pytest.raises(UnavailableError):
            async with gone.read() as connection:
                await keys.get(connection, "x")
        await gone.close()

    runner.run(work())
