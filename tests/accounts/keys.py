"""Keys of a store, made without a server."""

import asyncio
from pathlib import Path
from typing import Any

from fundament.store import keys, migrate, usage
from fundament.store.database import Database, locate
from fundament.store.keys import Key


def make_key(folder: Path, store_url: str = "", *, tier: str = "free", **fields: Any) -> str:
    """A new key in the store of a data directory, or in the one at `store_url`."""
    url = locate(store_url, folder)
    migrate.prepare(url)

    async def make() -> str:
        store = Database(url)
        async with store.write() as connection:
            _, shown = await keys.create(connection, "test", tier=tier, **fields)
        await store.close()
        return shown

    return asyncio.run(make())


def read_key(key: str, folder: Path, store_url: str = "") -> Key:
    """What the store knows of a key."""

    async def read() -> Key | None:
        store = Database(locate(store_url, folder))
        async with store.read() as connection:
            found = await keys.get(connection, id_of(key))
        await store.close()
        return found

    found = asyncio.run(read())
    assert found is not None
    return found


def read_usage(key: str, folder: Path, store_url: str = "") -> int:
    """How many requests of a key the store knows."""

    async def read() -> int:
        store = Database(locate(store_url, folder))
        async with store.read() as connection:
            found = await usage.find(connection, key_id=id_of(key))
        await store.close()
        return sum(each.requests for each in found)

    return asyncio.run(read())


def id_of(key: str) -> str:
    """The id that a key names."""
    found = keys.split(key)
    assert found is not None
    return found[0]


def bearer(key: str) -> dict[str, str]:
    """The header that brings a key."""
    return {"Authorization": f"Bearer {key}"}
