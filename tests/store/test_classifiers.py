"""Classifiers: made, found, held by one at a time, updated, deleted; the same on both databases."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import select

from fundament.store import classifiers, keys
from fundament.store.classifiers import Access, Learned, Summary
from fundament.store.database import Database

LABELS = ["a", "b\u0000", "ü \U0001f642 \u2028", "'; DROP TABLE classifiers; --"]
LEARNED = Learned(labels=LABELS, head=b"\x00head", examples=b"\x00first", n_examples=7)
MORE = Learned(labels=[*LABELS, "more"], head=b"better", examples=b"second", n_examples=2)


async def make(store: Database, owner: str = "me", *, access: Access = "private", most: int = 16) -> str | None:
    async with store.write() as connection:
        return await classifiers.create(
            connection, owner, LEARNED, model="m", task="classification", dim=4, access=access, most=most
        )


async def made(store: Database, owner: str = "me", *, access: Access = "private") -> str:
    classifier_id = await make(store, owner, access=access)
    assert classifier_id is not None
    return classifier_id


async def key(store: Database, **fields: Any) -> str:
    async with store.write() as connection:
        made, _ = await keys.create(connection, "mine", tier="free", **fields)
    return made.id


async def hold(store: Database, classifier_id: str, mark: str, owner: str = "me") -> Summary | None:
    async with store.write() as connection:
        return await classifiers.hold(connection, classifier_id, owner, mark)


async def update(store: Database, classifier_id: str, mark: str) -> bool:
    async with store.write() as connection:
        return await classifiers.update(connection, classifier_id, mark, MORE)


def test_what_is_kept_is_found(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        before = datetime.now(UTC)
        classifier_id = await made(store)
        async with store.read() as connection:
            found = await classifiers.find(connection, classifier_id, "me")
            [listed] = await classifiers.listed(connection, "me")
            assert await classifiers.owns(connection, classifier_id, "me")
            assert await classifiers.examples(connection, classifier_id) == [LEARNED.examples]
        assert found is not None
        assert found.summary == listed
        assert found.head == LEARNED.head
        assert listed.labels == LABELS
        assert (listed.model, listed.task, listed.dim, listed.access) == ("m", "classification", 4, "private")
        assert (listed.n_examples, listed.updated_number, listed.used_number) == (7, 0, 0)
        assert before <= listed.created_at == listed.updated_at <= datetime.now(UTC)
        assert listed.used_at is None

    runner.run(work())


def test_others_find_public_ones_only_and_own_none(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        me = await key(store)
        private, public = await made(store, me), await made(store, me, access="public")
        async with store.read() as connection:
            assert await classifiers.find(connection, private, "other") is None
            found = await classifiers.find(connection, public, "other")
            assert found is not None
            assert found.summary.owner == me
            assert not await classifiers.owns(connection, public, "other")
            assert await classifiers.listed(connection, "other") == []
            assert await classifiers.find(connection, "nothing", me) is None
            assert [one.id for one in await classifiers.listed(connection, me)] == [private, public]

    runner.run(work())


def test_a_public_one_answers_others_as_long_as_its_owners_key_works(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        revoked, rotated = await key(store), await key(store)
        expired = await key(store, expires_at=datetime.now(UTC) - timedelta(seconds=1))
        owners = [revoked, rotated, expired, ""]  # the last are made where no keys are asked for
        ids = [await made(store, owner, access="public") for owner in owners]

        async def asked() -> list[bool]:
            async with store.read() as connection:
                return [await classifiers.find(connection, one, "other") is not None for one in ids]

        assert await asked() == [True, True, False, True]
        async with store.write() as connection:
            await keys.revoke(connection, revoked)
            await keys.rotate(connection, rotated)
        assert await asked() == [False, True, False, True]

    runner.run(work())


def test_nobody_makes_more_than_allowed_however_many_at_once(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        await made(store, "other")
        ids = await asyncio.gather(*(make(store, most=3) for _ in range(12)))
        assert sum(found is not None for found in ids) == 3
        async with store.read() as connection:
            assert await classifiers.count(connection, "me") == 3
            rows = await connection.execute(select(classifiers.classifier_examples.c.classifier_id))
            assert len(rows.all()) == 4
        await made(store, "third")

    runner.run(work())


def test_one_at_a_time_holds_a_classifier(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        classifier_id = await made(store)
        held = await asyncio.gather(*(hold(store, classifier_id, f"{number}") for number in range(8)))
        [(number, found)] = [(number, found) for number, found in enumerate(held) if found]
        async with store.read() as connection:
            assert await classifiers.listed(connection, "me") == [found]
        holder = f"{number}"
        assert await hold(store, classifier_id, holder)  # renewed
        assert not await update(store, classifier_id, "somebody else")
        async with store.write() as connection:
            await classifiers.release(connection, classifier_id, "somebody else")
        assert not await hold(store, classifier_id, "next")
        async with store.write() as connection:
            await classifiers.release(connection, classifier_id, holder)
        assert await hold(store, classifier_id, "next")
        assert not await hold(store, "nothing", "next")
        assert not await hold(store, await made(store, access="public"), "next", "other")

    runner.run(work())


def test_a_mark_that_nobody_renews_runs_out(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        classifier_id = await made(store)
        assert await hold(store, classifier_id, "dead")
        async with store.write() as connection:
            past = datetime.now(UTC) - timedelta(seconds=1)
            await connection.execute(classifiers.classifiers.update().values(held_until=past))
        assert await hold(store, classifier_id, "living")
        assert not await update(store, classifier_id, "dead")
        assert await update(store, classifier_id, "living")

    runner.run(work())


def test_an_update_adds_to_what_there_is_and_lets_go(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        classifier_id = await made(store)
        async with store.read() as connection:
            [before] = await classifiers.listed(connection, "me")
        for number in (1, 2):
            assert await hold(store, classifier_id, f"{number}")
            assert await update(store, classifier_id, f"{number}")
            assert not await update(store, classifier_id, f"{number}")
        async with store.read() as connection:
            after = await classifiers.find(connection, classifier_id, "me")
            assert await classifiers.examples(connection, classifier_id) == [LEARNED.examples, *[MORE.examples] * 2]
        assert after is not None
        assert after.head == MORE.head
        changed = after.summary.updated_at
        assert changed > before.updated_at
        assert after.summary == replace(before, labels=MORE.labels, n_examples=11, updated_number=2, updated_at=changed)

    runner.run(work())


def test_whoever_holds_a_classifier_knows_all_that_it_has_learned(store: Database, runner: asyncio.Runner) -> None:
    async def learn(classifier_id: str, mark: str) -> int:
        while (known := await hold(store, classifier_id, mark)) is None:
            await asyncio.sleep(0)
        assert await update(store, classifier_id, mark)
        return known.n_examples

    async def work() -> None:
        classifier_id = await made(store)
        known = await asyncio.gather(*(learn(classifier_id, f"{number}") for number in range(12)))
        assert sorted(known) == [7 + 2 * number for number in range(12)]

    runner.run(work())


def test_an_update_that_fails_leaves_everything_as_it_was(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        classifier_id = await made(store)
        assert await hold(store, classifier_id, "mark")
        with pytest.raises(RuntimeError):
            async with store.write() as connection:
                assert await classifiers.update(connection, classifier_id, "mark", MORE)
                raise RuntimeError
        async with store.read() as connection:
            found = await classifiers.find(connection, classifier_id, "me")
            assert await classifiers.examples(connection, classifier_id) == [LEARNED.examples]
        assert found is not None
        assert found.head == LEARNED.head

    runner.run(work())


def test_every_use_is_counted(store: Database, runner: asyncio.Runner) -> None:
    async def use(*uses: tuple[str, int, datetime]) -> None:
        async with store.write() as connection:
            await classifiers.note_uses(connection, {key: (n_times, at) for key, n_times, at in uses})

    async def work() -> None:
        classifier_id, other = await made(store), await made(store)
        now = datetime.now(UTC)
        at = [now - timedelta(seconds=abs(number - 7)) for number in range(20)]
        await asyncio.gather(
            use(), use(("nothing", 1, now)), *(use((classifier_id, 2, moment), (other, 1, now)) for moment in at)
        )
        async with store.read() as connection:
            used, unused = await classifiers.listed(connection, "me")
        assert (used.used_number, used.used_at) == (40, now)
        assert (unused.id, unused.used_number, unused.used_at) == (other, 20, now)

    runner.run(work())


def test_a_deleted_classifier_leaves_nothing(store: Database, runner: asyncio.Runner) -> None:
    async def work() -> None:
        classifier_id, other = await made(store), await made(store)
        async with store.write() as connection:
            await classifiers.remove(connection, classifier_id)
            await classifiers.remove(connection, classifier_id)
        async with store.read() as connection:
            assert await classifiers.find(connection, classifier_id, "me") is None
            assert await classifiers.examples(connection, classifier_id) == []
            assert await classifiers.examples(connection, other) == [LEARNED.examples]
        assert not await update(store, classifier_id, "mark")

    runner.run(work())
