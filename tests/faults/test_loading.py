"""A model that does not load: what its callers are told, and what its operator."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundament.errors import CheckpointError
from tests.checkpoints import jina_v3
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL as EMBEDDED

MODEL = "jina-embeddings-v3"
REASON = f"a vector of '{MODEL}' has 1024 numbers, one of this checkpoint 48; is it another model?"


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """A server of a directory that is another model than its name says."""
    jina_v3.woven(tmp_path / "v3", max_position_embeddings=8194)
    with running(tmp_path / "data", models=[f"{MODEL}={tmp_path / 'v3'}"]) as api:
        yield api


def test_callers_are_told_to_come_back_and_the_log_says_why(
    api: Api, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fundament"):
        answer = api.run(api.client.post("/v1/embeddings", json={"model": MODEL, "input": "a", "dimensions": 1024}))
    conforms(answer)
    assert (answer.status_code, answer.json()["code"]) == (503, "SERVICE_UNAVAILABLE")
    assert answer.json()["detail"] == f"Model '{MODEL}' cannot be loaded here; the server's log says why."
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("60", "false")
    failed, asked = [(record.getMessage(), record.fields) for record in caplog.records]
    assert failed == ("model did not load", {"model": MODEL, "reason": f"{tmp_path / 'v3'}: {REASON}"})
    assert (asked[0], asked[1]["status"], asked[1]["reason"]) == ("request", 503, answer.json()["detail"])


def test_ready_says_what_is_wrong_with_which_model(api: Api, tmp_path: Path) -> None:
    answer = api.run(api.ready())
    said = f"Model '{MODEL}' does not load: {tmp_path / 'v3'}: {REASON}"
    assert (answer.status_code, answer.json()["detail"]) == (503, said)


def test_one_that_does_not_load_keeps_no_other_from_it_nor_the_server_from_being_ready_later(tmp_path: Path) -> None:
    jina_v3.woven(tmp_path / "v3", max_position_embeddings=8194)
    weights = tmp_path / "v3" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    models = [f"{MODEL}={tmp_path / 'v3'}", EMBEDDED]
    with running(tmp_path / "data", models=models, dims={MODEL: 48}, dtype="float32") as api:

        async def loaded() -> None:
            while f'fundament_model_loads_total{{model="{EMBEDDED}"}}' not in (await api.client.get("/metrics")).text:
                await asyncio.sleep(0.01)

        api.run(loaded())
        assert MODEL in api.run(api.ready()).json()["detail"]
        weights.write_bytes(whole)
        answer = api.run(api.client.post("/v1/embeddings", json={"model": MODEL, "input": "a"}))
        assert answer.status_code == 200
        assert api.run(api.ready()).status_code == 200


def test_no_path_of_the_server_reaches_a_caller(api: Api, tmp_path: Path) -> None:
    (tmp_path / "v3" / "model.safetensors").unlink()
    answer = api.run(api.client.post("/v1/embeddings", json={"model": MODEL, "input": "a"}))
    assert answer.status_code == 503
    assert str(tmp_path) not in answer.text


def test_models_that_may_no_longer_be_read_are_no_callers_business(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(data_dir: Path) -> None:
        raise CheckpointError(f"{data_dir}/models cannot be read")

    monkeypatch.setattr("fundament.app.pulled", refuses)
    answer = api.run(api.client.post("/v1/embeddings", json={"model": "another", "input": "a"}))
    conforms(answer)
    assert (answer.status_code, answer.json()["code"]) == (400, "INPUT_MODEL_NOT_FOUND")
    assert str(tmp_path) not in answer.text
