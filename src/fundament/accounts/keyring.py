"""Looking keys up: each at most once a second in every process, so that a revoked one stops within that."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from fundament.errors import AuthError, UnavailableError
from fundament.store import keys
from fundament.store.database import Database
from fundament.store.keys import Key
from fundament.telemetry import say

_VALID_SECONDS = 0.8  # less than the second that is promised: what is read then may be written a moment before
_MOST_KEPT = 10_000


@dataclass(slots=True)
class _Seen:
    """A key as it was read; `at` is when reading began."""

    key: Key
    at: float


class Keyring:
    """The keys that were used lately.

    Args:
        store: where keys are.
        clock: seconds, of any beginning.
    """

    def __init__(self, store: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._seen: dict[str, _Seen] = {}
        self._reading: dict[str, asyncio.Task[_Seen | None]] = {}

    async def look(self) -> None:
        """Say so in the log where no key works, and nobody can call."""
        with suppress(UnavailableError):
            async with self._store.read() as connection:
                n_keys = (await connection.execute(keys.working())).scalar_one()
            if not n_keys:
                say("no key works yet: fundament keys create NAME", level=logging.WARNING)

    async def open(self, authorization: str | None, *, admin: bool = False) -> Key:
        """The key that an `Authorization` header brings.

        Args:
            authorization: the header.
            admin: whether an admin's key is wanted; what is refused says so.

        Raises:
            AuthError: there is none, it is not written as one, or it does not work.
            UnavailableError: the store does not answer.
        """
        if authorization is None:
            raise missing_key(admin=admin)
        scheme, _, text = authorization.strip().partition(" ")
        found = keys.split(text.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise AuthError(
                "AUTH_INVALID_FORMAT",
                "Invalid authorization format. Use 'Authorization: Bearer <api-key>' with a valid API key "
                "(65 characters, starts with 'jina_').",
            )
        key_id, secret = found
        key = await self._find(key_id)
        if key is not None and not key.proves(secret):
            key = await self._find(key_id, anew=True)  # it may just have been rotated
        if key is None or not key.proves(secret) or key.state(datetime.now(UTC)) != "active":
            raise AuthError(
                "AUTH_INVALID_API_KEY",
                f"Invalid API key: it is unknown, revoked or expired. {_make_one(admin)}",
            )
        return key

    async def _find(self, key_id: str, *, anew: bool = False) -> Key | None:
        seen = None if anew else self._seen.get(key_id)
        if seen is None or self._clock() - seen.at > _VALID_SECONDS:
            # Requests that come together read it once.
            task = self._reading.get(key_id)
            if task is None:
                task = self._reading[key_id] = asyncio.ensure_future(self._read(key_id))
                task.add_done_callback(lambda _: self._reading.pop(key_id))
            seen = await asyncio.shield(task)
        return None if seen is None else seen.key

    async def _read(self, key_id: str) -> _Seen | None:
        at = self._clock()
        async with self._store.read() as connection:
            key = await keys.get(connection, key_id)
        if key is None:
            self._seen.pop(key_id, None)
            return None
        if len(self._seen) >= _MOST_KEPT:
            self._seen.clear()
        seen = self._seen[key_id] = _Seen(key, at)
        return seen


def missing_key(*, admin: bool = False) -> AuthError:
    """What is said to somebody who brings no key."""
    return AuthError(
        "AUTH_MISSING_API_KEY",
        "Authentication required. Provide your API key via the Authorization header: "
        f"'Authorization: Bearer <api-key>'. {_make_one(admin)}",
    )


def _make_one(admin: bool) -> str:
    return "Make one: fundament keys create NAME" + (" --admin" if admin else "")
