"""What was used, gathered in memory and written once a second, behind the answers."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import uuid4

from fundament.store import classifiers, keys, ledgers, usage
from fundament.store.database import Database
from fundament.store.usage import Line
from fundament.telemetry import say_rarely

_WRITE_SECONDS = 0.8  # with the time that writing takes, at most a second is lost when the process is killed


@dataclass(slots=True)
class Entry:
    """What is written in one transaction.

    Attributes:
        number: its place in the ledger, from 1.
        uses: requests and tokens, by what is counted together.
        touched: when keys were last used.
        refunds: tokens to give back, by key.
        asked: how often classifiers were asked, and when last.
    """

    number: int
    uses: dict[Line, list[int]] = field(default_factory=dict)
    touched: dict[str, datetime] = field(default_factory=dict)
    refunds: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, tuple[int, datetime]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.uses or self.touched or self.refunds or self.asked)


class Ledger:
    """Usage, last uses, refunds and questions to classifiers that are not yet written.

    Args:
        store: where they go.
    """

    def __init__(self, store: Database) -> None:
        self._store = store
        self._id = uuid4().hex
        self._entry = Entry(1)
        self._unwritten: Entry | None = None  # perhaps written: it stays as it is until the store says so
        self._writing = asyncio.Lock()

    def use(self, line: Line, *, n_requests: int, n_tokens: int) -> None:
        """Note what a request used; less than nothing where something is taken back."""
        counts = self._entry.uses.setdefault(line, [0, 0])
        counts[0] += n_requests
        counts[1] += n_tokens

    def touch(self, key_id: str) -> None:
        """Note that a key was used now."""
        self._entry.touched[key_id] = datetime.now(UTC)

    def refund(self, key_id: str, n_tokens: int) -> None:
        """Give tokens back to a balance."""
        self._entry.refunds[key_id] += n_tokens

    def ask(self, classifier_id: str) -> None:
        """Note that a classifier was asked now."""
        n_times, _ = self._entry.asked.get(classifier_id, (0, None))
        self._entry.asked[classifier_id] = n_times + 1, datetime.now(UTC)

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
            try:
                if self._unwritten is not None:
                    await self._keep(self._unwritten)
                if entry := self._entry:
                    self._unwritten, self._entry = entry, Entry(entry.number + 1)
                    await self._keep(entry)
            except Exception as error:
                say_rarely("usage is not written yet", reason=error)

    async def _keep(self, entry: Entry) -> None:
        async with self._store.write() as connection:
            if await ledgers.begin(connection, self._id, entry.number):
                uses = {line: (counts[0], counts[1]) for line, counts in entry.uses.items()}
                await usage.add(connection, uses)
                await keys.settle(connection, entry.touched, entry.refunds)
                await classifiers.note_uses(connection, entry.asked)
        self._unwritten = None
