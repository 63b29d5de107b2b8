"""Classifiers of several callers, and while they are updated: who may do what, and who has to wait."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fundament.api.state import State
from fundament.errors import UnavailableError
from fundament.store import classifiers, keys
from tests.accounts.keys import bearer, make_key
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

EXAMPLES = [
    {"text": "a cat sleeps on the sofa", "label": "animal"},
    {"text": "shares fell sharply", "label": "money"},
]
NOBODY = "00000000-0000-0000-0000-000000000000"


class Gate:
    """An engine that lets nobody through while it is closed, and says when somebody waits."""

    def __init__(self, state: State) -> None:
        self.engine, self.reached, self.open = state.engine, asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def run(self, *call: Any, **options: Any) -> Any:
        self.reached.set()
        await self.open.wait()
        if self.failure:
            raise self.failure
        return await self.engine.run(*call, **options)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running(tmp_path) as api:
        yield api


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, dict[str, str], dict[str, str]]]:
    """An application that asks for keys, and the headers of two callers."""
    folder = tmp_path_factory.mktemp("keys")
    mine, others = bearer(make_key(folder)), bearer(make_key(folder))
    with running(folder, auth=True) as api:
        yield api, mine, others


async def call(api: Api, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    response = await api.client.request(method, path, json=body, **options)
    conforms(response)
    return response


async def trained(api: Api, access: str = "private", **options: Any) -> str:
    body = {"model": MODEL, "input": EXAMPLES, "access": access}
    response = await call(api, "POST", "/v1/train", body, **options)
    assert response.status_code == 200, response.text
    found: str = response.json()["classifier_id"]
    return found


async def ask(api: Api, classifier_id: str, **options: Any) -> httpx.Response:
    return await call(api, "POST", "/v1/classify", {"classifier_id": classifier_id, "input": "a dog"}, **options)


async def update(api: Api, classifier_id: str, **options: Any) -> httpx.Response:
    body = {"classifier_id": classifier_id, "input": {"text": "a red rose", "label": "plant"}}
    return await call(api, "POST", "/v1/train", body, **options)


async def delete(api: Api, classifier_id: str, **options: Any) -> httpx.Response:
    return await call(api, "DELETE", f"/v1/classifiers/{classifier_id}", **options)


async def summaries(api: Api, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await call(api, "GET", "/v1/classifiers", **options)).json()
    return found


def test_a_private_classifier_is_its_owners_alone(shared: tuple[Api, dict[str, str], dict[str, str]]) -> None:
    api, mine, others = shared

    async def work() -> None:
        classifier_id = await trained(api, "private", headers=mine)
        before = await summaries(api, headers=mine)
        assert await summaries(api, headers=others) == []
        for act in (ask, update, delete):
            refused, missing = await act(api, classifier_id, headers=others), await act(api, NOBODY, headers=others)
            assert refused.status_code == missing.status_code == 404
            words = [answer.json()["detail"] for answer in (refused, missing)]
            assert words[0].replace(classifier_id, NOBODY) == words[1]  # nothing tells that it is there
            assert (await act(api, classifier_id)).status_code == 401
        assert await summaries(api, headers=mine) == before
        for act in (ask, update, delete):
            assert (await act(api, classifier_id, headers=mine)).status_code == 200

    api.run(work())


def test_a_public_classifier_is_asked_by_everybody_and_changed_by_its_owner(
    shared: tuple[Api, dict[str, str], dict[str, str]],
) -> None:
    api, mine, others = shared

    async def work() -> None:
        classifier_id = await trained(api, "public", headers=mine)
        assert (await ask(api, classifier_id, headers=others)).status_code == 200
        assert await summaries(api, headers=others) == []
        for act in (update, delete):
            assert (await act(api, classifier_id, headers=others)).status_code == 404
        [found] = await summaries(api, headers=mine)
        assert (found["used_number"], found["updated_number"]) == (1, 0)
        assert found["user_id"] != NOBODY
        await delete(api, classifier_id, headers=mine)

    api.run(work())


def test_a_public_classifier_ends_for_others_with_its_owners_key(
    shared: tuple[Api, dict[str, str], dict[str, str]],
) -> None:
    api, _, others = shared

    async def work() -> None:
        state: State = api.app.state.parts
        async with state.store.write() as connection:
            owner, shown = await keys.create(connection, "gone soon", tier="free")
        classifier_id = await trained(api, "public", headers=bearer(shown))
        assert (await ask(api, classifier_id, headers=others)).status_code == 200
        async with state.store.write() as connection:
            await keys.revoke(connection, owner.id)
        refused = await ask(api, classifier_id, headers=others)
        assert refused.status_code == 404
        assert refused.json()["detail"] == f"Classifier '{classifier_id}' not found or access denied."

    api.run(work())


def test_an_admin_deletes_what_a_revoked_key_left_behind(
    shared: tuple[Api, dict[str, str], dict[str, str]],
) -> None:
    api, _, others = shared

    async def work() -> None:
        state: State = api.app.state.parts
        async with state.store.write() as connection:
            _, shown = await keys.create(connection, "boss", tier="free", admin=True)
            owner, left = await keys.create(connection, "gone soon", tier="free")
        admin, path = bearer(shown), "/v1/admin/classifiers"
        classifier_id = await trained(api, headers=bearer(left))
        async with state.store.write() as connection:
            await keys.revoke(connection, owner.id)
        for headers, status in ((others, 403), ({}, 401)):
            assert (await call(api, "GET", path, headers=headers)).status_code == status
            assert (await call(api, "DELETE", f"{path}/{classifier_id}", headers=headers)).status_code == status
        assert (await delete(api, classifier_id, headers=admin)).status_code == 404  # there it is its owner's alone
        everybodys = (await call(api, "GET", path, headers=admin)).json()["data"]
        assert {one["classifier_id"]: one["key_id"] for one in everybodys}[classifier_id] == owner.id
        deleted = await call(api, "DELETE", f"{path}/{classifier_id}", headers=admin)
        assert deleted.json() == {"classifier_id": classifier_id, "object": "classifier", "deleted": True}
        everybodys = (await call(api, "GET", path, headers=admin)).json()["data"]
        assert classifier_id not in {one["classifier_id"] for one in everybodys}
        assert (await call(api, "DELETE", f"{path}/{classifier_id}", headers=admin)).status_code == 404

    api.run(work())


def test_each_key_has_its_own_room(shared: tuple[Api, dict[str, str], dict[str, str]]) -> None:
    api, mine, others = shared

    async def work() -> None:
        api.app.state.parts.settings.max_classifiers = 2
        body = {"model": MODEL, "input": EXAMPLES}
        answers = await asyncio.gather(*(call(api, "POST", "/v1/train", body, headers=mine) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 403, 403]
        await trained(api, headers=others)
        users = {one["user_id"] for headers in (mine, others) for one in await summaries(api, headers=headers)}
        assert len(users) == 2

    api.run(work())


def test_one_of_two_updates_at_once_is_told_to_wait(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        before = (await ask(api, classifier_id)).json()["data"]
        gate = Gate(api.app.state.parts)
        api.app.state.parts.engine = gate
        first = asyncio.ensure_future(update(api, classifier_id))
        await gate.reached.wait()
        for act in (update, delete):
            refused = await act(api, classifier_id)
            assert refused.status_code == 409
            assert refused.json()["code"] == "CONFLICT_RESOURCE_BUSY"
            assert f"Classifier '{classifier_id}' is currently being modified" in refused.json()["detail"]
        api.app.state.parts.engine = gate.engine
        assert (await ask(api, classifier_id)).json()["data"] == before  # whoever asks need not wait
        gate.open.set()
        assert (await first).status_code == 200
        [found] = await summaries(api)
        assert (found["updated_number"], found["labels"]) == (1, ["animal", "money", "plant"])
        assert (await update(api, classifier_id)).status_code == 200

    api.run(work())


def test_an_update_that_fails_leaves_the_classifier_free_and_as_it_was(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        before = (await ask(api, classifier_id)).json()["data"]
        gate = Gate(api.app.state.parts)
        api.app.state.parts.engine, gate.failure = gate, UnavailableError("Nobody is here.")
        gate.open.set()
        assert (await update(api, classifier_id)).status_code == 503
        api.app.state.parts.engine = gate.engine
        assert (await ask(api, classifier_id)).json()["data"] == before
        assert (await update(api, classifier_id)).status_code == 200

    api.run(work())


def test_an_update_that_is_kept_is_answered_though_its_hold_cannot_be_let_go(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise UnavailableError("The store is away.")

    async def work() -> None:
        classifier_id = await trained(api)
        with monkeypatch.context() as patch:
            patch.setattr(classifiers, "release", away)
            assert (await update(api, classifier_id)).status_code == 200
        [found] = await summaries(api)
        assert (found["updated_number"], found["labels"]) == (1, ["animal", "money", "plant"])

    api.run(work())


def test_an_update_whose_client_leaves_frees_the_classifier(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        gate = Gate(api.app.state.parts)
        api.app.state.parts.engine = gate
        leaving = asyncio.ensure_future(update(api, classifier_id))
        await gate.reached.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        api.app.state.parts.engine = gate.engine
        while (answer := await update(api, classifier_id)).status_code == 409:
            await asyncio.sleep(0.01)
        assert answer.status_code == 200

    api.run(work())


def test_an_update_that_lost_its_hold_changes_nothing(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        state: State = api.app.state.parts
        gate = Gate(state)
        api.app.state.parts.engine = gate
        late = asyncio.ensure_future(update(api, classifier_id))
        await gate.reached.wait()
        async with state.store.write() as connection:
            await connection.execute(classifiers.classifiers.update().values(held_by="somebody else"))
        gate.open.set()
        assert (await late).status_code == 409
        [found] = await summaries(api)
        assert (found["updated_number"], found["labels"]) == (0, ["animal", "money"])

    api.run(work())


def test_a_classifier_that_is_deleted_while_it_is_asked_still_answers(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        gate = Gate(api.app.state.parts)
        api.app.state.parts.engine = gate
        asking = asyncio.ensure_future(ask(api, classifier_id))
        await gate.reached.wait()
        assert (await delete(api, classifier_id)).status_code == 200
        gate.open.set()
        assert (await asking).status_code == 200
        assert (await ask(api, classifier_id)).status_code == 404
        assert await summaries(api) == []

    api.run(work())


def test_a_classifier_has_an_end_of_learning(tmp_path: Path) -> None:
    with running(tmp_path, max_classifier_examples=3) as api:

        async def work() -> None:
            classifier_id = await trained(api)
            assert (await update(api, classifier_id)).status_code == 200
            refused = await update(api, classifier_id)
            assert refused.status_code == 403
            assert refused.json()["code"] == "AUTHZ_RESOURCE_LIMIT_EXCEEDED"
            assert "4 examples in all, maximum 3" in refused.json()["detail"]
            body = {"model": MODEL, "input": EXAMPLES * 2}
            assert (await call(api, "POST", "/v1/train", body)).status_code == 403

        api.run(work())


def test_a_classifier_reads_no_vectors_of_another_length(api: Api) -> None:
    async def work() -> None:
        classifier_id = await trained(api)
        async with api.app.state.parts.store.write() as connection:
            await connection.execute(classifiers.classifiers.update().values(dim=7))
        for act in (ask, update):
            refused = await act(api, classifier_id)
            assert refused.status_code == 422
            assert "vectors of 7 numbers" in refused.json()["detail"]
            assert "now gives 384" in refused.json()["detail"]

    api.run(work())


def test_an_application_serves_what_another_on_its_store_has_trained(store_url: str, tmp_path: Path) -> None:
    with running(tmp_path / "one", store_url=store_url) as api:
        classifier_id = api.run(trained(api))
        learned = api.run(ask(api, classifier_id)).json()
    with running(tmp_path / "other", store_url=store_url) as api:
        assert api.run(ask(api, classifier_id)).json() == learned
        assert api.run(update(api, classifier_id)).status_code == 200
        learned = api.run(ask(api, classifier_id)).json()
    with running(tmp_path / "one", store_url=store_url) as api:
        [found] = api.run(summaries(api))  # an application that ends writes what it was asked
        assert (found["used_number"], found["updated_number"]) == (3, 1)
        assert api.run(ask(api, classifier_id)).json() == learned
        assert api.run(delete(api, classifier_id)).status_code == 200
        assert api.run(ask(api, classifier_id)).status_code == 404
