"""The tables `classifiers` and `classifier_examples`: what training learned, and what it learned from.

A classifier that is being updated is held by one process: `hold` puts its mark on the row for a while, which it renews
until `update` takes it away together with what was learned. A mark that nobody renews runs out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal
from uuid import uuid4

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    and_,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    true,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from fundament.store.keys import keys, works
from fundament.store.schema import Instant, metadata, take_turns

HOLD_SECONDS = 60
Access = Literal["public", "private"]

classifiers = Table(
    "classifiers",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner", String(12), nullable=False, index=True),
    Column("model", String(256), nullable=False),
    Column("task", String(64)),
    Column("dim", Integer, nullable=False),
    Column("access", String(16), nullable=False),
    Column("labels", JSON, nullable=False),
    Column("head", LargeBinary, nullable=False),
    Column("n_examples", Integer, nullable=False),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("updated_number", BigInteger, nullable=False),
    Column("used_at", Instant),
    Column("used_number", BigInteger, nullable=False),
    Column("held_by", String(36)),
    Column("held_until", Instant),
)

classifier_examples = Table(
    "classifier_examples",
    metadata,
    Column("classifier_id", String(36), ForeignKey(classifiers.c.id, ondelete="CASCADE"), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A classifier without what it learned.

    Attributes:
        id: a UUID.
        owner: id of the key that it belongs to; empty for callers without a key.
        model: id of the model whose vectors it reads.
        task: what texts are read for.
        dim: numbers of those vectors.
        access: who may use it: everybody, or its owner.
        labels: by the number of their class.
        n_examples: how many it learned from.
        updated_number: how often it was updated.
        used_number: how often it was asked.
    """

    id: str
    owner: str
    model: str
    task: str | None
    dim: int
    access: Access
    labels: Sequence[str]
    n_examples: int
    created_at: datetime
    updated_at: datetime
    updated_number: int
    used_at: datetime | None
    used_number: int


_SUMMARY = [classifiers.c[name] for name in Summary.__dataclass_fields__]


@dataclass(frozen=True, slots=True)
class Trained:
    """A classifier and the head that it learned, as written."""

    summary: Summary
    head: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a training adds to a classifier.

    Attributes:
        labels: all of them, by the number of their class.
        head: learned from all examples, as written.
        examples: those of this training, as written.
        n_examples: how many these are.
    """

    labels: Sequence[str]
    head: bytes
    examples: bytes
    n_examples: int


async def create(
    connection: AsyncConnection,
    owner: str,
    learned: Learned,
    *,
    model: str,
    task: str | None,
    dim: int,
    access: Access,
    most: int,
) -> str | None:
    """Keep a new classifier and give its id; None, and nothing kept, where the owner has `most` of them."""
    await take_turns(connection, f"classifiers of {owner}")
    if await count(connection, owner) >= most:
        return None
    classifier_id, now = str(uuid4()), datetime.now(UTC)
    await connection.execute(
        classifiers.insert().values(
            id=classifier_id,
            owner=owner,
            model=model,
            task=task,
            dim=dim,
            access=access,
            labels=list(learned.labels),
            head=learned.head,
            n_examples=learned.n_examples,
            created_at=now,
            updated_at=now,
            updated_number=0,
            used_number=0,
        )
    )
    await _add_examples(connection, classifier_id, 0, learned.examples)
    return classifier_id


async def count(connection: AsyncConnection, owner: str) -> int:
    """How many classifiers someone has."""
    statement = select(func.count()).select_from(classifiers).where(classifiers.c.owner == owner)
    return (await connection.execute(statement)).scalar_one()


def _of(owner: str | None) -> ColumnElement[bool]:
    """Which classifiers are someone's; None means everybody's."""
    return true() if owner is None else classifiers.c.owner == owner


async def listed(connection: AsyncConnection, owner: str | None) -> Sequence[Summary]:
    """Someone's classifiers, or with None everybody's, the oldest first."""
    statement = select(*_SUMMARY).where(_of(owner))
    rows = await connection.execute(statement.order_by(classifiers.c.created_at, classifiers.c.id))
    return [Summary(**row._mapping) for row in rows]


async def find(connection: AsyncConnection, classifier_id: str, caller: str) -> Trained | None:
    """A classifier that `caller` may use: an own one, or a public one whose owner's key still works.

    Nobody could change or delete what a key left behind, nor say who taught it last: so it answers nobody.
    """
    owned = or_(classifiers.c.owner == "", exists().where(keys.c.id == classifiers.c.owner, works()))
    statement = select(*_SUMMARY, classifiers.c.head).where(
        classifiers.c.id == classifier_id,
        or_(classifiers.c.owner == caller, and_(classifiers.c.access == "public", owned)),
    )
    if (row := (await connection.execute(statement)).one_or_none()) is None:
        return None
    *_, head = row
    return Trained(Summary(**{name: row._mapping[name] for name in Summary.__dataclass_fields__}), head)


async def owns(connection: AsyncConnection, classifier_id: str, owner: str | None) -> bool:
    """Whether there is such a classifier of `owner`, or with None of anybody."""
    statement = select(classifiers.c.id).where(classifiers.c.id == classifier_id, _of(owner))
    return (await connection.execute(statement)).one_or_none() is not None


async def hold(connection: AsyncConnection, classifier_id: str, owner: str | None, mark: str) -> Summary | None:
    """Put a mark on a classifier of `owner` (None: of anybody), or renew it; the classifier as it is from then on.

    None where there is no such classifier, or somebody else's mark is on it.
    """
    now = datetime.now(UTC)
    taken = await connection.execute(
        classifiers.update()
        .where(
            classifiers.c.id == classifier_id,
            _of(owner),
            or_(
                classifiers.c.held_by.is_(None),
                classifiers.c.held_by == mark,
                classifiers.c.held_until < now,
            ),
        )
        .values(held_by=mark, held_until=now + timedelta(seconds=HOLD_SECONDS))
        .returning(*_SUMMARY)
    )
    row = taken.one_or_none()
    return None if row is None else Summary(**row._mapping)


async def release(connection: AsyncConnection, classifier_id: str, mark: str) -> None:
    """Take a mark away."""
    await connection.execute(
        classifiers.update()
        .where(classifiers.c.id == classifier_id, classifiers.c.held_by == mark)
        .values(held_by=None, held_until=None)
    )


async def examples(connection: AsyncConnection, classifier_id: str) -> Sequence[bytes]:
    """Everything that a classifier learned from, as written, in the order in which it came."""
    table = classifier_examples
    statement = select(table.c.content).where(table.c.classifier_id == classifier_id).order_by(table.c.number)
    return (await connection.execute(statement)).scalars().all()


async def update(connection: AsyncConnection, classifier_id: str, mark: str, learned: Learned) -> bool:
    """Keep what was learned and take the mark away; False, and nothing kept, where it is not on it any more."""
    row = await connection.execute(
        classifiers.update()
        .where(classifiers.c.id == classifier_id, classifiers.c.held_by == mark)
        .values(
            labels=list(learned.labels),
            head=learned.head,
            n_examples=classifiers.c.n_examples + learned.n_examples,
            updated_at=datetime.now(UTC),
            updated_number=classifiers.c.updated_number + 1,
            held_by=None,
            held_until=None,
        )
        .returning(classifiers.c.updated_number)
    )
    number = row.scalar_one_or_none()
    if number is None:
        return False
    await _add_examples(connection, classifier_id, number, learned.examples)
    return True


async def note_uses(connection: AsyncConnection, uses: Mapping[str, tuple[int, datetime]]) -> None:
    """Count how often classifiers were asked, and when for the last time."""
    if not uses:
        return
    at = bindparam("at", type_=Instant)
    statement = (
        classifiers.update()
        .where(classifiers.c.id == bindparam("classifier_id"))
        .values(
            used_number=classifiers.c.used_number + bindparam("n_times"),
            used_at=case((classifiers.c.used_at > at, classifiers.c.used_at), else_=at),
        )
    )
    # In one order, so that two processes never wait for each other's rows.
    rows = [{"classifier_id": key, "n_times": n_times, "at": at} for key, (n_times, at) in sorted(uses.items())]
    await connection.execute(statement, rows)


async def remove(connection: AsyncConnection, classifier_id: str) -> None:
    """Delete a classifier and its examples."""
    await connection.execute(classifiers.delete().where(classifiers.c.id == classifier_id))


async def _add_examples(connection: AsyncConnection, classifier_id: str, number: int, content: bytes) -> None:
    await connection.execute(
        classifier_examples.insert().values(classifier_id=classifier_id, number=number, content=content)
    )
