"""The other routes: models, health, metrics, documentation, and what is not there."""

import re

import httpx
import pytest

from fundament.api.chat import ChatRequest
from fundament.api.models import describe
from fundament.catalog import CATALOG
from tests.served import MODEL, Served, metrics_of, wait_until

LONG_ID = "sentence-transformers/all-MiniLM-L6-v2"


def test_the_models_list_names_what_is_served(client: httpx.Client) -> None:
    response = client.get("/v1/models")
    assert response.status_code == 200
    [model] = [model for model in response.json()["data"] if model["id"] == MODEL]
    assert model["hugging_face_id"] == LONG_ID
    assert model["owned_by"] == "sentence-transformers"
    assert (model["context_length"], model["max_tokens"]) == (256, 256)
    assert (model["max_output_length"], model["dimensions"]) == (384, 384)
    assert (model["input_modalities"], model["output_modalities"]) == (["text"], ["embeddings"])
    assert model["supports_multimodal"] is False
    assert model["type"] == "embedding"
    assert set(model["pricing"].values()) == {"0"}


def test_a_list_says_what_models_without_vectors_lack() -> None:
    chat, ranker = describe(CATALOG["jina-vlm"]), describe(CATALOG["jina-reranker-v2-base-multilingual"])
    assert (chat["dimensions"], ranker["dimensions"]) == (None, None)
    assert chat["max_output_length"] == chat["context_length"]
    assert set(chat["supported_sampling_parameters"]) <= set(ChatRequest.model_fields)


@pytest.mark.parametrize("name", [MODEL, LONG_ID, LONG_ID.replace("/", "%2F"), "All-MiniLM-L6-v2"])
def test_one_model_is_found_by_its_short_and_its_long_id(client: httpx.Client, name: str) -> None:
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 200
    assert response.json() == listed[MODEL]


def test_a_slash_too_many_is_passed_over(client: httpx.Client) -> None:
    asked = {"model": MODEL, "input": "a text"}
    found = client.post("/v1/embeddings/", json=asked)
    assert (found.status_code, found.json()) == (200, client.post("/v1/embeddings", json=asked).json())
    assert client.get("/docs/").text == client.get("/docs").text
    assert client.get("/").json() == client.get("/health").json()


@pytest.mark.parametrize("name", ["no-such-model", "some/where/else", "%00"])
def test_an_unknown_model_is_not_found(client: httpx.Client, name: str) -> None:
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["code"] == "RESOURCE_NOT_FOUND"
    assert MODEL in response.json()["detail"]


@pytest.mark.parametrize("path", ["/", "/live", "/health", "/healthz", "/ready"])
def test_health_answers(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.json()["status"] == ("ready" if path == "/ready" else "ok")


@pytest.mark.parametrize("path", ["/", "/live", "/health", "/healthz", "/ready", "/v1/models"])
def test_a_probe_gets_the_head_of_the_answer(client: httpx.Client, path: str) -> None:
    response = client.head(path)
    assert response.status_code == 200
    assert response.content == b""
    assert response.headers["content-length"] == str(len(client.get(path).content))


def test_a_path_that_is_not_there(client: httpx.Client) -> None:
    response = client.get("/v9/nowhere")
    assert response.status_code == 404
    assert response.json()["code"] == "RESOURCE_NOT_FOUND"
    assert response.json()["detail"] == "There is no /v9/nowhere here; see /docs."
    assert client.post("/v1", json={}).json()["detail"] == "There is no /v1 here; see /docs."


@pytest.mark.parametrize(
    ("path", "meant"), [("/embeddings", "/v1/embeddings"), ("/v2/reranks", "/v2/rerank"), ("/embed", "/v1/embeddings")]
)
def test_a_path_that_is_nearly_there(client: httpx.Client, path: str, meant: str) -> None:
    detail = client.post(path, json={}).json()["detail"]
    assert detail == f"There is no {path} here; see /docs. Did you mean {meant}?"


@pytest.mark.parametrize(
    ("method", "path", "allowed"), [("GET", "/v1/embeddings", "POST"), ("POST", "/live", "GET, HEAD")]
)
def test_a_method_that_is_not_answered(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)
    assert response.status_code == 405
    assert allowed in response.headers["allow"]
    assert f"use {allowed}" in response.json()["detail"]


def test_every_answer_has_a_request_id_of_its_own(client: httpx.Client) -> None:
    seen = {client.get(path).headers["x-request-id"] for path in ("/live", "/live", "/nope", "/v1/models", "/metrics")}
    assert len(seen) == 5


def test_metrics_count_requests_and_tokens(client: httpx.Client) -> None:
    def page() -> dict[str, float]:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        return metrics_of(response.text)

    before = page()
    answer = client.post("/v1/embeddings", json={"model": MODEL, "input": ["one", "two"]}).json()
    client.post("/v1/embeddings", json={"model": MODEL})
    after = page()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["fundament_tokens_total"] == answer["usage"]["total_tokens"]
    assert grown["fundament_requests_total"] == 3  # and the first page itself
    assert grown["fundament_request_seconds_count"] == 3
    assert grown["fundament_queue_seconds_count"] >= 1
    assert grown["fundament_forward_seconds_count"] >= 1
    assert grown["fundament_batch_rows_sum"] == 2
    assert grown["fundament_batch_fill_count"] >= 1
    assert grown["fundament_failed_rows_total"] == 0
    assert after["fundament_rows_waiting"] == 0
    assert after["fundament_model_loads_total"] == 1
    assert after["fundament_model_bytes"] > 10_000_000


def test_every_request_is_logged_with_its_id_and_never_with_its_input(client: httpx.Client, server: Served) -> None:
    secret = "xyzzy-plugh"
    bodies: list[dict[str, object]] = [
        {"model": MODEL, "input": secret},
        {"model": MODEL, "input": [{"text": secret}] * 3, "embedding_type": "base64"},
        {"model": MODEL, "input": f"{secret} " * 300},
        {"model": MODEL, "input": {"image": secret}},
        {"model": MODEL, "input": "x", "task": [secret], "embedding_type": secret},
        {"model": MODEL, secret: {secret: secret}},
    ]
    responses = [client.post("/v1/embeddings", json=body) for body in bodies]
    responses.append(client.post("/v1/embeddings", content=f'{{"input": "{secret}'))

    def logged() -> dict[str, dict[str, object]] | None:  # a line is written after its answer is sent
        lines = {event["request_id"]: event for event in server.events() if event["event"] == "request"}
        return lines if all(response.headers["x-request-id"] in lines for response in responses) else None

    lines = wait_until(logged, "a line for every request")
    for response in responses:
        line = lines[response.headers["x-request-id"]]
        assert line["status"] == response.status_code
        assert line["path"] == "/v1/embeddings"
    assert lines[responses[1].headers["x-request-id"]]["inputs"] == 3
    assert secret not in server.log()


def test_the_documentation_answers(client: httpx.Client) -> None:
    for page in ("/docs", "/redoc"):
        answer = client.get(page)
        assert "text/html" in answer.headers["content-type"]
        files = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
        assert any(file.endswith(".js") for file in files)
        for file in files:  # from here: no other server is asked
            assert client.get(file).content
            refused = client.post(file)
            assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert client.get("/openapi.json").json()["openapi"].startswith("3.1")
