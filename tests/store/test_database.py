"""Transactions end with their block, however it ends."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from fundament.store.database import Database, connected, locate

# Its first row takes a while and more follow, so who is cancelled meanwhile leaves an unfinished statement behind.
_SLOW = text(
    "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3000000) "
    "SELECT i FROM n WHERE i > 2999000"
)


@pytest.mark.parametrize("n_cancels", [1, 2])
def test_a_cancelled_transaction_is_undone_at_once(
    store_url: str, store: Database, runner: asyncio.Runner, n_cancels: int
) -> None:
    async def write() -> None:
        async with store.write() as connection:
            await connection.execute(text("CREATE TABLE half (done INTEGER)"))
            await connection.execute(_SLOW)

    async def write_and_leave() -> asyncio.Task[None]:
        writing = asyncio.ensure_future(write())
        await asyncio.sleep(0.1)
        for _ in range(n_cancels):
            writing.cancel()
            await asyncio.sleep(0.01)
        await asyncio.wait([writing])
        return writing

    left = runner.run(write_and_leave())
    assert left.cancelled()
    # The task keeps what was raised, and that the frames with the statement: nobody may have to wait for their end.
    with connected(locate(store_url, Path())) as connection:
        assert not inspect(connection).has_table("half")
