"""The table `keys`: who may call.

A key is `jina_`, 12 characters that name it and 48 that prove it. Of the latter only the SHA-256 is stored: they are
random, so a slow hash would protect them no better.
"""

import hmac
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    LargeBinary,
    Select,
    String,
    Table,
    and_,
    bindparam,
    func,
    or_,
    select,
)
from sqlalchemy import Row as SqlRow
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.schema import Instant, metadata

PREFIX = "jina_"
MOST_TOKENS = 2**53  # of a balance: what JSON's readers everywhere keep exactly
LAST_YEAR = 9998  # of a key's end: PostgreSQL gives moments in its own time zone, where 9999 may become 10000
ID_LENGTH, SECRET_LENGTH = 12, 48
_LENGTH = len(PREFIX) + ID_LENGTH + SECRET_LENGTH
_CHARACTERS = string.ascii_letters + string.digits
_ALLOWED = frozenset(_CHARACTERS)

keys = Table(
    "keys",
    metadata,
    Column("id", String(ID_LENGTH), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("tier", String(40), nullable=False),
    Column("balance", BigInteger),
    Column("admin", Boolean, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    Column("last_used_at", Instant),
    CheckConstraint("balance >= 0", name="balance"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as the store knows it.

    Attributes:
        id: names it, in lists and in usage; no secret.
        name: what its owner calls it.
        digest: SHA-256 of its secret.
        tier: the name of its limits.
        balance: tokens that it may still spend; None where nobody counts.
        admin: may manage keys and see everybody's usage.
    """

    id: str
    name: str
    digest: bytes
    tier: str
    balance: int | None
    admin: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def proves(self, secret: str) -> bool:
        """Whether `secret` is this key's, compared in constant time."""
        return hmac.compare_digest(self.digest, _digest(secret))

    def state(self, now: datetime) -> Literal["active", "revoked", "expired"]:
        """Whether it works, and why not."""
        if self.revoked_at is not None:
            return "revoked"
        return "active" if self.expires_at is None or now < self.expires_at else "expired"


def split(key: str) -> tuple[str, str] | None:
    """The id and the secret of a key; None where it has not the form of one."""
    if len(key) != _LENGTH or not key.startswith(PREFIX) or not _ALLOWED.issuperset(key[len(PREFIX) :]):
        return None
    return key[len(PREFIX) : len(PREFIX) + ID_LENGTH], key[len(PREFIX) + ID_LENGTH :]


async def create(
    connection: AsyncConnection,
    name: str,
    *,
    tier: str,
    balance: int | None = None,
    admin: bool = False,
    expires_at: datetime | None = None,
) -> tuple[Key, str]:
    """Make a key; the second value is the key itself, which nobody sees again."""
    key_id, secret = _random(ID_LENGTH), _random(SECRET_LENGTH)
    row = await connection.execute(
        keys.insert()
        .values(
            id=key_id,
            name=name,
            digest=_digest(secret),
            tier=tier,
            balance=balance,
            admin=admin,
            created_at=datetime.now(UTC),
            expires_at=expires_at,
        )
        .returning(*keys.c)
    )
    return _key(row.one()), f"{PREFIX}{key_id}{secret}"


async def get(connection: AsyncConnection, key_id: str, *, locked: bool = False) -> Key | None:
    """One key by its id; `locked` keeps it as it is until the transaction ends."""
    statement = select(keys).where(keys.c.id == key_id)
    row = (await connection.execute(statement.with_for_update() if locked else statement)).one_or_none()
    return None if row is None else _key(row)


async def counted(connection: AsyncConnection, key_ids: Collection[str]) -> set[str]:
    """Which of these keys have a balance."""
    found = await connection.execute(select(keys.c.id).where(keys.c.id.in_(key_ids), keys.c.balance.is_not(None)))
    return set(found.scalars())


async def everyone(connection: AsyncConnection) -> Sequence[Key]:
    """All keys, the oldest first."""
    return [_key(row) for row in await connection.execute(select(keys).order_by(keys.c.created_at, keys.c.id))]


def works() -> ColumnElement[bool]:
    """What is true of a key that works now."""
    return and_(keys.c.revoked_at.is_(None), or_(keys.c.expires_at.is_(None), keys.c.expires_at > datetime.now(UTC)))


def working() -> Select[int]:
    """The statement that counts the keys that work now."""
    return select(func.count()).select_from(keys).where(works())


async def change(connection: AsyncConnection, key_id: str, values: Mapping[str, Any]) -> Key | None:
    """Give a key another name, tier or end; None where there is no such key, or it is revoked."""
    statement = keys.update().where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(**values)
    found = (await connection.execute(statement.returning(*keys.c))).one_or_none()
    return None if found is None else _key(found)


async def revoke(connection: AsyncConnection, key_id: str) -> Key | None:
    """Stop a key for good; one that is revoked already stays as it is. None where there is no such key."""
    now = datetime.now(UTC)
    await connection.execute(
        keys.update().where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    return await get(connection, key_id)


async def rotate(connection: AsyncConnection, key_id: str) -> tuple[Key, str] | None:
    """Give a key a new secret; the old one stops. None where there is no such key, or it is revoked."""
    secret = _random(SECRET_LENGTH)
    row = await connection.execute(
        keys.update()
        .where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
        .values(digest=_digest(secret))
        .returning(*keys.c)
    )
    found = row.one_or_none()
    return None if found is None else (_key(found), f"{PREFIX}{key_id}{secret}")


async def spend(connection: AsyncConnection, key_id: str, n_tokens: int) -> bool:
    """Take tokens from a balance; False, and nothing taken, where it holds fewer."""
    taken = await connection.execute(
        keys.update()
        .where(keys.c.id == key_id, keys.c.balance >= n_tokens)
        .values(balance=keys.c.balance - n_tokens)
        .returning(keys.c.id)
    )
    return taken.one_or_none() is not None


async def credit(connection: AsyncConnection, key_id: str, n_tokens: int) -> Key | None:
    """Put tokens on a balance; None where there is no such key, nobody counts its tokens, or it would hold too many."""
    row = await connection.execute(
        keys.update()
        .where(keys.c.id == key_id, keys.c.balance <= MOST_TOKENS - n_tokens)
        .values(balance=keys.c.balance + n_tokens)
        .returning(*keys.c)
    )
    found = row.one_or_none()
    return None if found is None else _key(found)


async def settle(connection: AsyncConnection, used: Mapping[str, datetime], refunds: Mapping[str, int]) -> None:
    """Note when keys were last used, and give refunds to balances that are counted."""
    if not (used or refunds):
        return
    statement = (
        keys.update()
        .where(keys.c.id == bindparam("key_id"))
        .values(
            last_used_at=func.coalesce(bindparam("at", type_=Instant), keys.c.last_used_at),
            balance=keys.c.balance + bindparam("n_tokens"),
        )
    )
    # In one order, so that two processes never wait for each other's rows.
    rows = [
        {"key_id": key_id, "at": used.get(key_id), "n_tokens": refunds.get(key_id, 0)}
        for key_id in sorted({*used, *refunds})
    ]
    await connection.execute(statement, rows)


def _key(row: SqlRow[Any]) -> Key:
    return Key(**row._mapping)


def _digest(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_CHARACTERS) for _ in range(length))
