"""A forward pass that fails: whom it harms, what the answer says, and what stays alive. The model is the real one."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from fundament.backbone.device import Placement
from fundament.core import Array, Call, Item, Model, Result
from fundament.engine import local
from fundament.engine.weights import Local
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import PATIENCE_SECONDS, metrics_of

POISON = "xylophone"

Fault = Callable[[Placement, Sequence[bool], list[Array]], list[Array]]
"""What happens to a batch, given which of its rows hold the poison and what they would have given."""


class Gate:
    """Where batches wait while a test lets rows gather."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def close(self) -> None:
        self.reached.clear()
        self.open.clear()

    def pass_through(self) -> None:
        self.reached.set()
        assert self.open.wait(PATIENCE_SECONDS)


class Poisoned:
    """A model that meets a fault where a text holds the poison; its batches pass through a gate."""

    def __init__(self, model: Model, placement: Placement, fault: Fault, gate: Gate) -> None:
        self.model, self.placement, self.fault, self.gate = model, placement, fault, gate
        self.n_bytes = model.n_bytes

    def prepare(self, call: Call) -> list[Item]:
        items = self.model.prepare(call)
        for item, text in zip(items, call.texts, strict=True):
            item.features["poisoned"] = np.array(POISON in text)
        return items

    def forward(self, items: Sequence[Item]) -> list[Array]:
        self.gate.pass_through()
        arrays = self.model.forward(items)
        return self.fault(self.placement, [bool(item.features["poisoned"]) for item in items], arrays)

    def finish(self, call: Call, items: Sequence[Item], arrays: Sequence[Array]) -> Result:
        return self.model.finish(call, items, arrays)


def raises(placement: Placement, poisoned: Sequence[bool], arrays: list[Array]) -> list[Array]:
    if any(poisoned):
        raise RuntimeError("this batch holds " + POISON)
    return arrays


def runs_out_of_memory(placement: Placement, poisoned: Sequence[bool], arrays: list[Array]) -> list[Array]:
    if len(poisoned) > 1:
        raise torch.OutOfMemoryError("out of memory")
    return arrays


def dies(placement: Placement, poisoned: Sequence[bool], arrays: list[Array]) -> list[Array]:
    if any(poisoned):
        raise SystemExit("the driver has gone")
    return arrays


def is_not_finite(placement: Placement, poisoned: Sequence[bool], arrays: list[Array]) -> list[Array]:
    return [array * np.nan if bad else array for array, bad in zip(arrays, poisoned, strict=True)]


def is_not_finite_in_bfloat16(placement: Placement, poisoned: Sequence[bool], arrays: list[Array]) -> list[Array]:
    return is_not_finite(placement, poisoned, arrays) if placement.dtype == torch.bfloat16 else arrays


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gate: Gate) -> Iterator[Api]:
    load = local.load_model

    def load_poisoned(where: Local, placement: Placement) -> Model:
        return Poisoned(load(where, placement), placement, request.param, gate)

    monkeypatch.setattr(local, "load_model", load_poisoned)
    with running(tmp_path, dtype="bfloat16") as api:
        yield api


def together(api: Api, gate: Gate, *calls: Sequence[str]) -> list[httpx.Response]:
    """Answers of calls whose rows wait together while another batch runs."""

    async def send() -> list[httpx.Response]:
        gate.close()
        first = asyncio.ensure_future(api.embed("first"))
        while not gate.reached.is_set():
            assert not first.done(), first.result().text
            await asyncio.sleep(0.001)
        tasks = [asyncio.ensure_future(api.embed(call)) for call in calls]
        n_rows = sum(map(len, calls))
        while metrics_of((await api.client.get("/metrics")).text)["fundament_rows_waiting"] < n_rows:
            await asyncio.sleep(0.001)
        gate.open.set()
        assert (await first).status_code == 200
        return await asyncio.gather(*tasks)

    answers = api.run(send())
    for answer in answers:
        conforms(answer)
    return answers


@pytest.mark.parametrize("api", [raises], indirect=True)
def test_a_forward_that_raises_fails_one_request(api: Api, gate: Gate) -> None:
    alone = api.run(api.embed(["first", "second"])).json()
    calls = ["first", "second"], ["well", f"a {POISON}", "as well"], ["first", "second"]
    before, bad, after = together(api, gate, *calls)
    assert bad.status_code == 500
    assert bad.json()["code"] == "INTERNAL_ERROR"
    assert bad.json()["detail"] == "Input 1 failed in the model: RuntimeError."
    for answer in (before, after):
        assert answer.status_code == 200
        for one, other in zip(alone["data"], answer.json()["data"], strict=True):
            np.testing.assert_allclose(one["embedding"], other["embedding"], atol=0.01)
    assert api.run(api.ready()).status_code == 200


@pytest.mark.parametrize("api", [is_not_finite], indirect=True)
def test_a_row_that_is_not_finite_is_named(api: Api, gate: Gate) -> None:
    bad, good = together(api, gate, ["well", "as well", POISON], ["well"])
    assert bad.status_code == 500
    assert "Input 2" in bad.json()["detail"]
    assert "not finite" in bad.json()["detail"]
    assert good.status_code == 200
    page = metrics_of(api.run(api.client.get("/metrics")).text)
    assert page["fundament_failed_rows_total"] == 1


@pytest.mark.parametrize("api", [is_not_finite_in_bfloat16], indirect=True)
def test_a_row_that_is_not_finite_is_run_again_in_float32(api: Api, gate: Gate) -> None:
    [answer] = together(api, gate, ["well", POISON])
    assert answer.status_code == 200
    assert np.isfinite([item["embedding"] for item in answer.json()["data"]]).all()


@pytest.mark.parametrize("api", [runs_out_of_memory], indirect=True)
def test_a_batch_that_does_not_fit_is_halved(api: Api, gate: Gate) -> None:
    for answer in together(api, gate, ["one", "two"], ["three"], ["four", "five"]):
        assert answer.status_code == 200


@pytest.mark.parametrize("api", [dies], indirect=True)
def test_a_model_whose_thread_has_died_says_so(api: Api, gate: Gate) -> None:
    [answer] = together(api, gate, [POISON])
    assert answer.status_code == 503
    not_ready = api.run(api.ready())
    conforms(not_ready)
    assert not_ready.status_code == 503
    assert "the driver has gone" in not_ready.json()["detail"]
    refused = api.run(api.embed("well"))
    conforms(refused)
    assert refused.status_code == 503
    assert "has stopped" in refused.json()["detail"]
    assert api.run(api.client.get("/live")).status_code == 200


@pytest.mark.parametrize("api", [raises], indirect=True)
def test_an_error_that_nobody_expected_is_answered_in_the_same_shape(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr("fundament.api.answers.shorten", break_down)
    answer = api.run(api.embed("well"))
    conforms(answer)
    assert answer.status_code == 500
    assert answer.json()["code"] == "INTERNAL_ERROR"
    assert "secret" not in answer.text
