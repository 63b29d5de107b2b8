"""Other names of served models: who answers, what the answer says, and what is listed."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fundament.aliases import Alias, read_aliases
from fundament.app import create_app
from fundament.catalog import CATALOG, EMBEDDED
from fundament.config import Settings
from fundament.errors import FundamentError
from tests.checkpoints import jina_v3
from tests.checkpoints.xlm_roberta import HIDDEN
from tests.inprocess import Api, running, work_until

SERVED = {EMBEDDED.id: EMBEDDED}
ALIASES = [f"text-embedding-ada-002={EMBEDDED.id}", "elser-v2=sentence-transformers/all-MiniLM-L6-v2"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("aliases"), models=[EMBEDDED.repo], aliases=ALIASES) as api:
        yield api


def embed(api: Api, model: str) -> dict[str, object]:
    response = api.run(api.client.post("/v1/embeddings", json={"model": model, "input": "a text"}))
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.parametrize("name", ["text-embedding-ada-002", "openai/text-embedding-ada-002", "elser-v2", "ELSER-v2"])
def test_an_alias_answers_as_its_model_and_says_so(api: Api, name: str) -> None:
    assert embed(api, name) == embed(api, EMBEDDED.id)
    assert embed(api, name)["model"] == EMBEDDED.id


def test_a_long_name_is_no_alias_and_is_echoed(api: Api) -> None:
    assert embed(api, EMBEDDED.repo)["model"] == EMBEDDED.repo


def test_the_list_shows_aliases_as_what_they_stand_for(api: Api) -> None:
    entries = {model["id"]: model for model in api.run(api.client.get("/v1/models")).json()["data"]}
    assert list(entries) == [EMBEDDED.id, "elser-v2", "text-embedding-ada-002"]
    own = entries[EMBEDDED.id]
    assert "alias_of" not in own
    for name in ("elser-v2", "text-embedding-ada-002"):
        assert entries[name] == own | {"id": name, "alias_of": EMBEDDED.id}


@pytest.mark.parametrize("name", ["text-embedding-ada-002", "openai/text-embedding-ada-002"])
def test_one_alias_is_described_under_its_own_name(api: Api, name: str) -> None:
    described = api.run(api.client.get(f"/v1/models/{name}")).json()
    assert (described["id"], described["alias_of"]) == ("text-embedding-ada-002", EMBEDDED.id)


def test_who_asks_for_an_unknown_model_is_told_of_the_aliases(api: Api) -> None:
    listed = f"Available models: {EMBEDDED.id}, elser-v2, text-embedding-ada-002."
    for response in (
        api.run(api.client.post("/v1/embeddings", json={"model": "nobody", "input": "a"})),
        api.run(api.client.get("/v1/models/nobody")),
    ):
        assert response.json()["detail"].endswith(listed)


def test_who_misspells_a_model_is_told_of_the_nearest(api: Api) -> None:
    for said, meant in (("all-minilm-l6-v3", EMBEDDED.id), ("elser-v3", "elser-v2"), ("bge-m4", "bge-m3")):
        detail = api.run(api.client.post("/v1/embeddings", json={"model": said, "input": "a"})).json()["detail"]
        assert f"Model '{said}' not found. Did you mean {meant}? Available models: " in detail


def test_an_alias_may_mean_a_model_of_a_whole_name() -> None:
    served = {name: replace(EMBEDDED, id=name) for name in ("mine", "team/mine")}
    assert read_aliases(["x=team/mine"], served) == {"x": Alias("team/mine")}


def test_a_name_of_the_catalogue_means_the_same_in_every_form() -> None:
    assert read_aliases(["jinaai/Jina-Embeddings-V3 = all-minilm-l6-v2"], SERVED) == {
        "jina-embeddings-v3": Alias(EMBEDDED.id)
    }


def test_an_alias_may_bring_a_task_and_a_name_may_have_a_colon() -> None:
    served = {"jina-embeddings-v3": CATALOG["jina-embeddings-v3"], "mine:v1": replace(EMBEDDED, id="mine:v1")}
    assert read_aliases(["q=jinaai/jina-embeddings-v3:retrieval.query", "x=mine:v1"], served) == {
        "q": Alias("jina-embeddings-v3", "retrieval.query"),
        "x": Alias("mine:v1"),
    }


def test_an_aliass_task_holds_where_the_caller_names_none(tmp_path: Path) -> None:
    name, task = "jina-embeddings-v3", "retrieval.query"
    model = f"{name}={jina_v3.woven(tmp_path / 'v3')}"
    with running(tmp_path, dims={name: HIDDEN}, models=[model], aliases=[f"v3-query={name}:{task}"]) as api:

        def vectors(**asked: str) -> list[object]:
            answer = api.run(api.client.post("/v1/embeddings", json={"input": ["a text"], **asked}))
            assert answer.json()["model"] == name
            return list(answer.json()["data"])

        assert vectors(model="v3-query") == vectors(model=name, task=task) != vectors(model=name)
        assert vectors(model="v3-query", task="separation") == vectors(model=name, task="separation")
        # As later models call it.
        assert vectors(model=name, task="clustering") == vectors(model=name, task="separation")
        assert api.run(api.client.get("/v1/models/v3-query")).json()["alias_of"] == f"{name}:{task}"
        state = api.app.state.parts
        assert state.find("v3-query") is state.find(name)  # it is embeddings' alone


def test_a_job_keeps_what_an_alias_stands_for(tmp_path: Path) -> None:
    name, task = "jina-embeddings-v3", "retrieval.query"
    model = f"{name}={jina_v3.woven(tmp_path / 'v3')}"
    aliases = [f"v3-query={name}:{task}"]
    with running(tmp_path, dims={name: HIDDEN}, models=[model], aliases=aliases, worker=False, dtype="float32") as api:
        state, asked = api.app.state.parts, {"model": "v3-query", "embedding_type": "base64"}
        [wanted] = api.run(api.client.post("/v1/embeddings", json={**asked, "input": ["a text"]})).json()["data"]
        made = api.run(api.client.post("/v1/batch/embeddings", json={**asked, "input": ["a text"]})).json()
        file, form = {"file": ("x.jsonl", b'"a text"')}, {"model": "v3-query"}
        older = api.run(api.client.post("/v1/bulk-embeddings", files=file, data=form)).json()
        state.aliases = {}  # a worker of its own may have none

        async def ended() -> bool:
            found = (await api.client.get(f"/v1/batch/{made['batch_id']}")).json()
            bulk = (await api.client.get(f"/v1/bulk-embeddings/{older['id']}")).json()
            assert (found["model"], bulk["model_name"]) == (name, name)
            return bool(found["status"] == bulk["status"] == "completed")

        work_until(api, ended)
        [line] = api.run(api.client.get(f"/v1/batch/{made['batch_id']}/output")).text.splitlines()
        assert json.loads(line)["response"]["body"]["data"] == [wanted]


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        (["x=nobody"], f"'nobody' is not served, so nothing could answer; served are {EMBEDDED.id}. Add it: --model"),
        (["x=jina-embeddings-v3"], "'jina-embeddings-v3' is not served"),
        ([f"y={EMBEDDED.id}", "x=y"], "'y' is not served"),
        ([f"{EMBEDDED.id}={EMBEDDED.id}"], "is itself a served model; choose another name"),
        ([f"{EMBEDDED.repo}={EMBEDDED.id}"], "is itself a served model"),
        ([f"x={EMBEDDED.id}", f"x={EMBEDDED.repo}"], f"'x' is already an alias of '{EMBEDDED.id}'; keep one"),
        (["x"], f"--alias x: write NAME=MODEL, as in --alias my-model={EMBEDDED.id}"),
        ([f"={EMBEDDED.id}"], "write NAME=MODEL"),
        (["x="], "write NAME=MODEL"),
        ([f"x={EMBEDDED.id}:retrieval.query"], f"the tasks of '{EMBEDDED.id}' are none, not 'retrieval.query'"),
    ],
)
def test_what_is_no_alias_stops_the_start(tmp_path: Path, aliases: list[str], words: str) -> None:
    with pytest.raises(FundamentError) as refusal:
        create_app(Settings(data_dir=tmp_path, aliases=aliases))
    assert words in refusal.value.detail


def test_a_model_that_comes_later_does_not_take_an_alias_away(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    state = api.app.state.parts
    monkeypatch.setattr(state, "served", lambda: {**SERVED, "elser-v2": CATALOG["elser-v2"]})
    assert state.find("elser-v2") is EMBEDDED
    entries = api.run(api.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in entries] == [EMBEDDED.id, "elser-v2", "text-embedding-ada-002"]


def test_the_environment_gives_aliases_with_commas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUNDAMENT_ALIASES", "a=all-minilm-l6-v2, b=all-minilm-l6-v2")
    assert Settings().aliases == ["a=all-minilm-l6-v2", "b=all-minilm-l6-v2"]
