"""Which header opens the door, and how soon a key stops."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from fundament.accounts.keyring import Keyring
from fundament.errors import AuthError
from fundament.store import keys
from fundament.store.database import Database
from tests.accounts.keys import id_of


async def make(store: Database, **fields: object) -> str:
    async with store.write() as connection:
        return (await keys.create(connection, "mine", tier="free", **fields))[1]  # type: ignore[arg-type]


async def code(ring: Keyring, authorization: str | None) -> str | None:
    try:
        await ring.open(authorization)
    except AuthError as error:
        return error.code
    return None


def test_the_codes_of_what_is_missing_malformed_and_unknown(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        ring, key = Keyring(store), await make(store)
        for good in (f"Bearer {key}", f"bearer   {key} "):
            assert await code(ring, good) is None
        assert await code(ring, None) == "AUTH_MISSING_API_KEY"
        for malformed in ("", "Bearer", key, f"Basic {key}", f"Bearer {key[:-1]}", f"Bearer {key} x", "Bearer none"):
            assert await code(ring, malformed) == "AUTH_INVALID_FORMAT", malformed
        swapped = key[:-1] + ("a" if key[-1] != "a" else "b")
        for unknown in (swapped, "jina_" + "a" * 60):
            assert await code(ring, f"Bearer {unknown}") == "AUTH_INVALID_API_KEY"

    runner.run(work())


def test_a_key_stops_within_a_second(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        now = 100.0
        ring = Keyring(store, clock=lambda: now)
        revoked, rotated = await make(store), await make(store)
        for key in (revoked, rotated):
            assert await code(ring, f"Bearer {key}") is None
        async with store.write() as connection:
            await keys.revoke(connection, id_of(revoked))
            again = await keys.rotate(connection, id_of(rotated))
        assert again is not None
        now += 0.99
        for key in (revoked, rotated):
            assert await code(ring, f"Bearer {key}") == "AUTH_INVALID_API_KEY"
        assert await code(ring, f"Bearer {again[1]}") is None

    runner.run(work())


def test_an_expired_key_stops_at_once(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        key = await make(store, expires_at=datetime.now(UTC) - timedelta(microseconds=1))
        assert await code(Keyring(store), f"Bearer {key}") == "AUTH_INVALID_API_KEY"

    runner.run(work())


def test_a_key_is_read_once_for_many(store: Database, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    n_read = 0
    get = keys.get

    async def counted(*arguments: object) -> object:
        nonlocal n_read
        n_read += 1
        return await get(*arguments)  # type: ignore[arg-type]

    async def work() -> None:
        key = await make(store)
        ring = Keyring(store, clock=lambda: 100.0)
        monkeypatch.setattr(keys, "get", counted)
        await asyncio.gather(*(ring.open(f"Bearer {key}") for _ in range(50)))
        await ring.open(f"Bearer {key}")

    runner.run(work())
    assert n_read == 1
