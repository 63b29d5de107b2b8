"""Spending balances: exact on every database, and one transaction for all who wait.

There is no timer. While a transaction runs, others gather, and the next one takes them all.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store import keys
from fundament.store.database import Database


@dataclass(slots=True)
class _Wish:
    key_id: str
    n_tokens: int
    granted: asyncio.Future[bool]


class Purse:
    """The balances of all keys.

    Args:
        store: where they are.
    """

    def __init__(self, store: Database) -> None:
        self._store = store
        self._wishes: list[_Wish] = []
        self._work: asyncio.Task[None] | None = None

    async def spend(self, key_id: str, n_tokens: int) -> bool:
        """Take tokens from a balance; False, and nothing taken, where it holds fewer.

        Raises:
            UnavailableError: the store does not answer.
        """
        wish = _Wish(key_id, n_tokens, asyncio.get_running_loop().create_future())
        self._wishes.append(wish)
        if self._work is None:
            self._work = asyncio.ensure_future(self._grant())
        return await wish.granted

    async def _grant(self) -> None:
        try:
            while wishes := self._wishes:
                self._wishes = []
                try:
                    async with self._store.write() as connection:
                        granted = await _spend(connection, wishes)
                except Exception as error:
                    for wish in wishes:
                        if not wish.granted.done():
                            wish.granted.set_exception(error)
                    continue
                for wish, answer in zip(wishes, granted, strict=True):
                    if not wish.granted.done():
                        wish.granted.set_result(answer)
        finally:
            self._work = None


async def _spend(connection: AsyncConnection, wishes: Sequence[_Wish]) -> list[bool]:
    """Whether each wish was granted, those of one key in the order in which they came."""
    granted = [True] * len(wishes)
    places: dict[str, list[int]] = defaultdict(list)
    for place, wish in enumerate(wishes):
        places[wish.key_id].append(place)
    for key_id in sorted(places):  # in one order, so that two processes never wait for each other
        of_key = places[key_id]
        if await keys.spend(connection, key_id, sum(wishes[place].n_tokens for place in of_key)):
            continue
        for place in of_key:
            granted[place] = len(of_key) > 1 and await keys.spend(connection, key_id, wishes[place].n_tokens)
    return granted
