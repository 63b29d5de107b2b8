"""A request that takes longer than one may: what it is told, what it costs, and what it leaves behind."""

from pathlib import Path

import pytest

from fundament.backbone.device import Placement
from fundament.core import Model
from fundament.engine import local
from fundament.engine.weights import Local
from tests.accounts.keys import bearer, make_key, read_key
from tests.contract.schemas import conforms
from tests.faults.test_rows import Gate, Poisoned, raises
from tests.inprocess import running
from tests.served import MODEL


def test_a_request_past_its_time_is_given_up_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, load = Gate(), local.load_model

    def load_held(where: Local, placement: Placement) -> Model:
        return Poisoned(load(where, placement), placement, raises, gate)

    monkeypatch.setattr(local, "load_model", load_held)
    key = make_key(tmp_path, balance=1_000)
    with running(tmp_path, auth=True) as api:
        state = api.app.state.parts
        api.client.headers.update(bearer(key))
        monkeypatch.setattr(state.settings, "request_seconds", 0.05)
        gate.close()
        for path, fields in (
            ("/v1/embeddings", {"input": "it runs"}),
            ("/v1/embeddings", {"input": ["it waits"] * 3}),
            ("/v1/rerank", {"query": "it waits", "documents": ["too"]}),
            ("/v1/classify", {"input": "it waits", "labels": ["a", "b"]}),
            ("/v1/train", {"input": [{"text": "it waits", "label": label} for label in "ab"]}),
        ):
            late = api.run(api.client.post(path, json={"model": MODEL, **fields}))
            conforms(late)
            assert (late.status_code, late.json()["code"]) == (504, "SERVICE_TIMEOUT")
            assert late.json()["detail"].startswith("Request timed out after 0.05 seconds.")
        assert state.engine._engine.memory.loaded[MODEL].batcher.n_waiting == 0
        monkeypatch.setattr(state.settings, "request_seconds", 0)
        gate.open.set()
        answered = api.run(api.embed("it is answered"))
        assert answered.status_code == 200
    assert read_key(key, tmp_path).balance == 1_000 - answered.json()["usage"]["total_tokens"]
