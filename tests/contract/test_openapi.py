"""The app's own OpenAPI document: it says what the specification says, and the server does what it says."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.accounts.keys import make_key
from tests.contract import schemas
from tests.served import MODEL, Served


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "EmbeddingResponse",
        "ClassificationResponse",
        "TrainingResponse",
        "ClassifierSummary",
        "ErrorResponse",
        "HTTPValidationError",
        "ModelInfo",
        "ModelListResponse",
        "RerankingResponse",
        "ChatCompletion",
    ],
)
def test_components_have_the_names_and_keys_of_the_answers(document: dict[str, Any], name: str) -> None:
    component, expected = document["components"]["schemas"][name], getattr(schemas, name)
    assert set(component["properties"]) == set(expected["properties"])
    assert set(expected["required"]) <= set(component["required"])


def test_every_route_documents_our_own_errors(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")):
                    name = "HTTPValidationError" if status == "422" else "ErrorResponse"
                    [content] = answer["content"].values()
                    assert content["schema"]["$ref"].endswith(f"/{name}"), (path, status)


def test_what_a_model_answers_may_take_too_long(document: dict[str, Any]) -> None:
    late = {
        path for path, methods in document["paths"].items() if "504" in methods.get("post", {}).get("responses", ())
    }
    models = ("embeddings", "multi-vector", "multi-embeddings", "rerank", "classify", "train", "chat/completions")
    assert late == {f"/v1/{name}" for name in models}


def test_the_server_does_what_its_document_says(document: dict[str, Any], server: Served, tmp_path: Path) -> None:
    """Schemathesis, all phases and all checks.

    The document holds for every model that may be served; what its fields may be for this one is narrowed here, so
    that requests which fit it must be accepted.
    """
    document = deepcopy(document)
    fields = {
        "model": {"enum": [MODEL]},
        "instruction": {"enum": ["", None]},
        "dimensions": {"enum": [384, None]},
        "late_chunking": {"enum": [False, None]},
        "late_chunking_window": {"enum": [64, None]},
        "return_multivector": {"enum": [False, None]},
        "return_tokenized_input": {"enum": [False, None]},
        "return_sparse": {"enum": [False, None]},
    }
    body = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"] |= fields
    body = document["paths"]["/v1/batch/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"] |= fields | {
        "input": body["properties"]["input"]["anyOf"][0] | {"minItems": 1, "maxItems": 20},
        **{name: {"type": "null"} for name in ("input_url", "input_file_id", "webhook_url")},
    }
    body["required"] = ["model", "input"]
    form = document["paths"]["/v1/bulk-embeddings"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"]["model"] = {"enum": [MODEL]}
    form = document["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"]["purpose"] = {"enum": ["batch"]}
    classify = document["paths"]["/v1/classify"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    classify["properties"] |= {"model": {"enum": [MODEL]}, "classifier_id": {"type": "null"}}
    classify["properties"]["labels"]["anyOf"].remove({"type": "null"})
    classify["required"] = ["model", "labels", "input"]
    train = document["paths"]["/v1/train"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    examples = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]  # no schema says that two labels differ
    train["properties"] |= {
        "model": {"enum": [MODEL]},
        "classifier_id": {"type": "null"},
        "num_iters": {"enum": [1, 10, None]},
        "input": {"enum": [examples]},
    }
    train["required"] = ["model", "input"]
    key_body = document["paths"]["/v1/admin/keys"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    key_body["properties"] |= {"tier": {"enum": ["free"]}, "expires_at": {"enum": [None, "2100-01-01T00:00:00Z"]}}
    body = document["paths"]["/v1/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body["properties"] |= {
        "model": {"enum": [MODEL, None]},
        "instruction": {"enum": ["", None]},
        "rank_fields": {"enum": [[], ["text"], None]},
        "top_n": {"enum": [1, 2, 10_000, None]},
        "max_doc_length": {"enum": [256, 8192, None]},
        "max_query_length": {"enum": [256, 8192, None]},
        "return_embeddings": {"enum": [False, None]},
        "return_multivector": {"enum": [False, None]},
        "return_sparse": {"enum": [False, None]},
    }
    # This model gives no vectors per token, and does not chat.
    for path in ("/v1/multi-vector", "/v1/multi-embeddings", "/v1/chat/completions"):
        del document["paths"][path]
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(document))
    key = make_key(server.log_file.parent, admin=True)
    options = [
        f"--header=Authorization: Bearer {key}",
        "--checks=all",
        "--max-examples=40",
        "--seed=1",
        "--warnings=off",
        "--no-color",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", str(file), f"--url={server.url}", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"Tested: {sum(len(methods) for methods in document['paths'].values())}" in ran.stdout
