"""Where a request does not say whether long inputs are cut, the operator does."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.inprocess import Api, running, work_until
from tests.served import MODEL

LONG = "word " * 300
CALLS = {
    "/v1/embeddings": {"input": [LONG, "short"]},
    "/v1/classify": {"input": [LONG, "short"], "labels": ["sea", "land"]},
    "/v1/train": {"input": [{"text": LONG, "label": "a"}, {"text": "short", "label": "b"}]},
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("cuts"), truncate=True) as api:
        yield api


def post(api: Api, path: str, **fields: object) -> httpx.Response:
    return api.run(api.client.post(path, json={"model": MODEL, **CALLS[path], **fields}))


@pytest.mark.parametrize("path", CALLS)
def test_inputs_are_cut_and_counted_where_the_operator_says_so(api: Api, path: str) -> None:
    for fields in ({}, {"truncate": None}, {"truncate": True}):
        answer = post(api, path, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize("path", CALLS)
def test_a_request_that_says_otherwise_is_heeded(api: Api, path: str) -> None:
    answer = post(api, path, truncate=False)
    assert (answer.status_code, answer.json()["code"]) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")


def test_a_trained_classifier_cuts_too(api: Api) -> None:
    classifier = post(api, "/v1/train").json()["classifier_id"]
    body = {"classifier_id": classifier, "input": [LONG]}
    answer = api.run(api.client.post("/v1/classify", json=body))
    assert answer.headers["x-truncated-inputs"] == "1"
    assert api.run(api.client.post("/v1/classify", json=body | {"truncate": False})).status_code == 400


@pytest.mark.parametrize(("fields", "n_failed"), [({}, 0), ({"truncate": None}, 0), ({"truncate": False}, 1)])
def test_a_job_is_cut_as_the_server_says_that_took_it_whoever_works(
    tmp_path: Path, fields: dict[str, object], n_failed: int
) -> None:
    body = {"model": MODEL, "input": [LONG, "short"], **fields}
    with running(tmp_path, truncate=True, worker=False, preload=False) as api:
        job = str(api.run(api.client.post("/v1/batch/embeddings", json=body)).json()["batch_id"])
    with running(tmp_path, worker=False, preload=False) as api:

        async def ended() -> bool:
            return (await api.client.get(f"/v1/batch/{job}")).json()["status"] == "completed"

        work_until(api, ended)
        assert api.run(api.client.get(f"/v1/batch/{job}")).json()["stats"]["failed"] == n_failed
