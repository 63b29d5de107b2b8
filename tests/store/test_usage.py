"""Usage adds up per line, whoever writes it."""

import asyncio
from datetime import date

from fundament.store import usage
from fundament.store.database import Database
from fundament.store.usage import Line, Use

DAY = date(2026, 11, 21)
ONE, TWO = Line("a", DAY, "m", "/v1/embeddings"), Line("b", date(2026, 11, 22), "m", "/v1/rerank")


def test_counts_of_many_writers_add_up(store: Database, runner: asyncio.Runner) -> None:
    async def write() -> None:
        async with store.write() as connection:
            await usage.add(connection, {TWO: (1, 5), ONE: (2, 30)})

    async def work() -> None:
        await asyncio.gather(*(write() for _ in range(10)))
        async with store.read() as connection:
            assert await usage.find(connection) == [
                Use(line=ONE, requests=20, tokens=300),
                Use(line=TWO, requests=10, tokens=50),
            ]
            for wanted in ({"key_id": "a"}, {"until": DAY}):
                assert [use.line for use in await usage.find(connection, **wanted)] == [ONE]
            assert [use.line for use in await usage.find(connection, since=TWO.day)] == [TWO]

    runner.run(work())


def test_nothing_is_nothing(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        async with store.write() as connection:
            await usage.add(connection, {})
            assert await usage.find(connection) == []

    runner.run(work())
