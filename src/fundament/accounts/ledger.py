"""What was used, gathered in memory and written once a second, behind the answers."""

import asyncio
import logging
from collections import defaultdict
from datetime import UTC, datetime

from fundament.store import classifiers, keys, usage
from fundament.store.database import Database
from fundament.store.usage import Line
from fundament.telemetry import say

_WRITE_SECONDS = 0.8  # with the time that writing takes, at most a second is lost when the process is killed


class Ledger:
    """Usage, last uses, refunds and questions to classifiers that are not yet written.

    Args:
        store: where they go.
    """

    def __init__(self, store: Database) -> None:
        self._store = store
        self._uses: dict[Line, list[int]] = {}
        self._touched: dict[str, datetime] = {}
        self._refunds: dict[str, int] = defaultdict(int)
        self._asked: dict[str, tuple[int, datetime]] = {}
        self._writing = asyncio.Lock()
        self._failed = False

    def use(self, key_id: str, model: str, endpoint: str, *, n_requests: int, n_tokens: int) -> None:
        """Note what a request used; less than nothing where something is taken back."""
        line = Line(key_id, datetime.now(UTC).date(), model, endpoint)
        counts = self._uses.setdefault(line, [0, 0])
        counts[0] += n_requests
        counts[1] += n_tokens

    def touch(self, key_id: str) -> None:
        """Note that a key was used now."""
        self._touched[key_id] = datetime.now(UTC)

    def refund(self, key_id: str, n_tokens: int) -> None:
        """Give tokens back to a balance."""
        self._refunds[key_id] += n_tokens

    def ask(self, classifier_id: str, *, n_times: int = 1, at: datetime | None = None) -> None:
        """Note that a classifier was asked, now where nothing else is said."""
        before, last = self._asked.get(classifier_id, (0, at))
        at = at or datetime.now(UTC)
        self._asked[classifier_id] = before + n_times, max(last or at, at)

    async def keep(self) -> None:
        """Write what gathers, for as long as this is awaited."""
        while True:
            await asyncio.sleep(_WRITE_SECONDS)
            await self.write()

    async def write(self) -> None:
        """Write what has gathered in one transaction; what cannot be written waits for the next time.

        A caller that is cancelled leaves it to end: half of it undone, something would be lost or written twice.
        """
        await asyncio.shield(self._write())

    async def _write(self) -> None:
        async with self._writing:
            uses, touched, refunds, asked = self._uses, self._touched, self._refunds, self._asked
            if not (uses or touched or refunds or asked):
                return
            self._uses, self._touched, self._refunds, self._asked = {}, {}, defaultdict(int), {}
            try:
                async with self._store.write() as connection:
                    await usage.add(connection, {line: (counts[0], counts[1]) for line, counts in uses.items()})
                    await keys.settle(connection, touched, refunds)
                    await classifiers.note_uses(connection, asked)
            except Exception as error:
                self._put_back(uses, touched, refunds)
                for classifier_id, (n_times, at) in asked.items():
                    self.ask(classifier_id, n_times=n_times, at=at)
                if not self._failed:
                    say("usage is not written yet", level=logging.WARNING, reason=error)
                self._failed = True
            else:
                self._failed = False

    def _put_back(self, uses: dict[Line, list[int]], touched: dict[str, datetime], refunds: dict[str, int]) -> None:
        for line, (n_requests, n_tokens) in uses.items():
            counts = self._uses.setdefault(line, [0, 0])
            counts[0] += n_requests
            counts[1] += n_tokens
        self._touched = {**touched, **self._touched}
        for key_id, n_tokens in refunds.items():
            self._refunds[key_id] += n_tokens
