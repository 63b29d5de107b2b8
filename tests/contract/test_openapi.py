"""The app's own OpenAPI document: it says what the specification says, and the server does what it says."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from jsonschema import Draft202012Validator

from fundament.api.auth import is_open
from fundament.app import create_app
from fundament.config import Settings
from tests.accounts.keys import make_key
from tests.checkpoints.clip import WIDTH, clip
from tests.checkpoints.omni import HIDDEN, omni
from tests.contract import schemas
from tests.media.files import RED, painted, pdf, plain, video, wav
from tests.served import MODEL, Served, serving

MEDIA = {"ImageDoc": "image", "VideoDoc": "video", "AudioDoc": "audio", "PDFDoc": "pdf"}
OMNI = "jina-embeddings-v5-omni-nano"


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


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("TextDoc", {"text"}),
        *((name, {field}) for name, field in MEDIA.items()),
        ("MergedContentGroup", {"content"}),
        ("TextTrainingItem", {"text", "label"}),
        ("ImageTrainingItem", {"image", "label"}),
    ],
)
def test_parts_of_requests_have_the_names_and_keys_of_the_specification(
    document: dict[str, Any], name: str, fields: set[str]
) -> None:
    component = document["components"]["schemas"][name]
    assert set(component["properties"]) == set(component["required"]) == fields


TEXT, IMAGE, VIDEO, AUDIO = {"text": "a"}, {"image": "a"}, {"video": "a"}, {"audio": "a"}
GROUP = {"content": [TEXT, IMAGE, VIDEO, AUDIO]}
EXAMPLES = [{**TEXT, "label": "a"}, {**IMAGE, "label": "b"}]


@pytest.mark.parametrize(
    ("path", "field", "fitting", "wrong"),
    [
        ("embeddings", "input", ["a", TEXT, IMAGE, VIDEO, AUDIO, {"pdf": "a"}, ["a", TEXT, IMAGE, GROUP]], [[], {}, 5]),
        ("embeddings", "input", [[GROUP]], [[{"pdf": "a"}], [{"content": []}], [{"content": [{"pdf": "a"}]}]]),
        ("rerank", "documents", [["a", TEXT, IMAGE]], ["a", [], [AUDIO]]),
        ("rerank", "query", ["a", TEXT, IMAGE], [["a"]]),
        ("classify", "input", ["a", TEXT, IMAGE, ["a", TEXT, IMAGE]], [[], {"pdf": "a"}]),
        ("train", "input", [*EXAMPLES, EXAMPLES], [[], TEXT, "a"]),
    ],
)
def test_bodies_may_hold_what_the_specification_says(
    document: dict[str, Any], path: str, field: str, fitting: list[Any], wrong: list[Any]
) -> None:
    body = document["paths"][f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = Draft202012Validator({**body["properties"][field], "components": document["components"]})
    for value in fitting:
        schema.validate(value)
    assert not [value for value in wrong if schema.is_valid(value)]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (str(value[key]) for key in value if key == "$ref")
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from names(each)

    led = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(names(document)) <= led


@pytest.mark.parametrize("auth", [True, False])
def test_what_needs_a_key_says_so(tmp_path: Path, auth: bool) -> None:
    document = create_app(Settings(data_dir=tmp_path, auth=auth)).openapi()
    assert document["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if is_open(path):
                assert "security" not in operation
            else:
                optional = not auth and not path.startswith("/v1/admin/")
                assert operation["security"] == ([{"HTTPBearer": []}, {}] if optional else [{"HTTPBearer": []}]), path


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
    assert late == {*(f"/v1/{name}" for name in models), "/v2/rerank"}


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
    components = document["components"]["schemas"]
    components |= dict.fromkeys((*MEDIA, "MergedContentGroup"), components["TextDoc"])
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
    for path, method in (("/v1/admin/keys", "post"), ("/v1/admin/keys/{key_id}", "patch")):
        key_body = document["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
        key_body["properties"] |= {"tier": {"enum": ["free"]}, "expires_at": {"enum": [None, "2100-01-01T00:00:00Z"]}}
    body = document["paths"]["/v1/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    document["paths"]["/v2/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"] = body
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
    key = make_key(server.log_file.parent, admin=True)
    schemathesis(document, server, tmp_path, f"--header=Authorization: Bearer {key}", "--checks=all")


def test_media_of_the_document_are_read_or_refused(document: dict[str, Any], tmp_path: Path) -> None:
    """The same of models that read images, and everything: whole files and broken ones, wherever they may be."""
    document = deepcopy(document)
    models = {"jina-clip-v2": clip(tmp_path / "clip"), OMNI: omni(tmp_path / "omni", "nano")}
    image, page, film = plain(RED), pdf([painted(RED)]), video([0, 200])
    whole = {
        "ImageDoc": image,
        "ImageTrainingItem": image,
        "PDFDoc": page,
        "AudioDoc": wav(np.zeros(800)),
        "VideoDoc": film,
    }
    for name, content in whole.items():
        [kind] = set(document["components"]["schemas"][name]["properties"]) - {"label"}
        given = {"anyOf": [{"const": base64.b64encode(content).decode()}, {"type": "string"}]}
        document["components"]["schemas"][name]["properties"][kind] = given
    document["paths"] = {
        path: {"post": document["paths"][path]["post"]}
        for path in ("/v1/embeddings", "/v1/rerank", "/v1/classify", "/v1/train")
    }
    for methods in document["paths"].values():
        body = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
        body["properties"]["model"] = {"enum": list(models)}
        body["required"] = sorted({*body["required"], "model"})
    named = ",".join(f"{model}={folder}" for model, folder in models.items())
    with serving(tmp_path, dims={"jina-clip-v2": WIDTH, OMNI: HIDDEN}, models=named) as server:
        checks = ("not_a_server_error", "status_code_conformance", "response_schema_conformance")
        schemathesis(document, server, tmp_path, f"--checks={','.join(checks)}", n_examples=20)
        read = {event["path"] for event in server.events() if event.get("status") == 200}
    assert read >= {"/v1/embeddings", "/v1/rerank", "/v1/classify"}  # no schema says that two labels differ


def schemathesis(document: dict[str, Any], server: Served, folder: Path, *options: str, n_examples: int = 40) -> None:
    """Send what a document allows, and what it does not, and check the answers."""
    file = folder / "openapi.json"
    file.write_text(json.dumps(document))
    usual = (f"--max-examples={n_examples}", "--seed=1", "--warnings=off", "--no-color")
    ran = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", str(file), f"--url={server.url}", *usual, *options],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"Tested: {sum(len(methods) for methods in document['paths'].values())}" in ran.stdout
