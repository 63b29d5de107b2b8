"""`fundament pull` and `models`: what they say, on which stream, with which exit code."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from fundament.app import create_app
from fundament.catalog import CATALOG, EMBEDDED
from fundament.cli import weights
from fundament.config import Settings
from fundament.engine import hub as hub_module
from fundament.engine.weights import pulled
from fundament.errors import ModelNotFoundError
from tests.cli.command import fundament
from tests.hub import Hub, hub_of, make_bert

SPEC = CATALOG["jina-embedding-t-en-v1"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_of(published) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


def test_a_model_is_pulled_once(hub: Hub, data_dir: Path) -> None:
    code, out, _ = fundament("pull", f"jinaai/{SPEC.id}")
    assert code == 0
    directory = data_dir / "models" / SPEC.id
    assert out.splitlines() == [
        f"{SPEC.id}: licence Apache-2.0, from {SPEC.repo}",
        f"{SPEC.id}: {pulled(data_dir)[SPEC.id].n_bytes / 1e6:.0f} MB in {directory}",
    ]
    n_requests = len(hub.seen)
    code, out, _ = fundament("pull", SPEC.id)
    assert code == 0
    assert f"{SPEC.id}: already in {directory}" in out
    assert len(hub.seen) == n_requests


def test_the_embedded_model_is_there_already(hub: Hub) -> None:
    code, out, _ = fundament("pull", EMBEDDED.id)
    assert (code, hub.seen) == (0, [])
    assert f"{EMBEDDED.id}: already in " in out


def test_a_running_application_serves_what_was_pulled_meanwhile(hub: Hub, data_dir: Path) -> None:
    parts = create_app(Settings(data_dir=data_dir, preload=False)).state.parts
    assert set(parts.served()) == {EMBEDDED.id}
    with pytest.raises(ModelNotFoundError, match="fundament pull"):
        parts.find(SPEC.id)
    assert fundament("pull", SPEC.id)[0] == 0
    assert parts.find(SPEC.id) == SPEC
    assert set(parts.served()) == {EMBEDDED.id, SPEC.id}


def test_a_licence_is_shown_first_and_must_be_accepted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CATALOG", {SPEC.id: replace(SPEC, licence="CC-BY-NC-4.0")})
    code, out, err = fundament("pull", SPEC.id)
    assert (code, hub.seen) == (1, [])
    assert out == f"{SPEC.id}: licence CC-BY-NC-4.0, from {SPEC.repo}\n"
    assert "commercial use needs an agreement with jinaai" in err
    assert "add --accept-licence" in err
    assert fundament("pull", SPEC.id, "--accept-licence")[0] == 0


def test_nothing_is_pulled_where_one_of_several_is_refused(hub: Hub, data_dir: Path) -> None:
    code, _, err = fundament("pull", SPEC.id, "elser-v2")
    assert code == 1
    assert err.startswith("fundament: The weights of 'elser-v2' cannot be pulled. None are public: serve a directory")
    code, _, err = fundament("pull", SPEC.id, "nobody-knows-it")
    assert code == 1
    assert err == "fundament: 'nobody-knows-it' is not in the catalogue; `fundament models` lists it.\n"
    assert fundament("pull", SPEC.id, "bge-m4")[2].endswith("`fundament models` lists it. Did you mean bge-m3?\n")
    assert hub.seen == []
    assert not data_dir.exists()


def test_what_goes_wrong_is_one_line_and_exit_code_1(hub: Hub) -> None:
    hub.listing_status = (503, {})
    code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert err.splitlines() == [
        f"fundament: {hub.url} answered 503 for {SPEC.repo}; what arrived is kept, pull again later."
    ]


def test_an_interrupted_pull_says_how_to_go_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(hub_module.os, "fsync", interrupt)
        code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert "the same command goes on from there" in err
    assert fundament("pull", SPEC.id)[0] == 0


def test_the_table_of_models(hub: Hub, data_dir: Path) -> None:
    code, out, _ = fundament("models")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert set(lines) == {"ID", *CATALOG}
    assert lines[EMBEDDED.id].endswith("23 M  91 MB  embedded")
    assert lines[SPEC.id].endswith("14 M")
    assert lines["elser-v2"].endswith("no public weights")
    end = lines["ID"].index("PARAMS") + len("PARAMS")
    assert all(line[:end].endswith(("PARAMS", " M")) for line in lines.values())
    rows = {row["id"]: row for row in json.loads(fundament("models", "--json")[1])}
    assert (rows[SPEC.id]["here"], rows[SPEC.id]["bytes"]) == (None, None)

    assert fundament("pull", SPEC.id)[0] == 0
    rows = {row["id"]: row for row in json.loads(fundament("models", "--json")[1])}
    assert rows[SPEC.id]["here"] == "on disk"
    assert rows[SPEC.id]["bytes"] == len(hub.files["model.safetensors"])
    assert rows[SPEC.id]["dimensions"] == SPEC.dim
    (data_dir / "models" / SPEC.id / "pulled.json").write_text("{}")
    assert {row["id"]: row["here"] for row in json.loads(fundament("models", "--json")[1])}[SPEC.id] == "pull again"


def test_a_family_without_a_module_is_not_served_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "CATALOG", {SPEC.id: replace(SPEC, family="of_another_time")})
    assert fundament("models")[1].splitlines()[1].endswith("not served yet")
    code, _, err = fundament("pull", SPEC.id)
    assert code == 1
    assert "not served by this release yet" in err
