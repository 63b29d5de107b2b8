"""What every answer of the HTTP API looks like, as JSON schemas, and the rules between its parts."""

import re
from typing import Any

import httpx
from jsonschema import Draft202012Validator

_STRING, _INTEGER, _BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_POSITIVE = {**_INTEGER, "minimum": 1}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object of these keys and no others."""
    properties = {**required, **(optional or {})}
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _list(items: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": items, **limits}


def _vector(minimum: int, maximum: int) -> dict[str, Any]:
    return _list({"type": "integer", "minimum": minimum, "maximum": maximum}, minItems=1)


_ENCODINGS = {
    "float": _list({"type": "number"}, minItems=1),
    "base64": {"type": "string", "pattern": "^[A-Za-z0-9+/]+=*$"},
    "ubinary": _vector(0, 255),
    "binary": _vector(-128, 127),
}
_MATRICES = {name: _list(vector, minItems=1) for name, vector in _ENCODINGS.items()}
_WEIGHTS = {"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0}}
_USAGES = [
    _object(
        {"total_tokens": _INTEGER, "prompt_tokens": _INTEGER},
        dict.fromkeys(("image_tokens", "audio_tokens", "video_tokens"), _POSITIVE),
    ),
    _object({"total_tokens": _INTEGER, "input_tokens": _INTEGER, "output_tokens": _INTEGER}),
]
_EMBEDDING = {
    "object": {"const": "embedding"},
    "index": {"type": "integer", "minimum": 0},
    "embedding": {
        "anyOf": [*_ENCODINGS.values(), {**_object({}, _ENCODINGS), "minProperties": 2}, _WEIGHTS],
    },
}
_MULTI_EMBEDDING = {
    "object": {"const": "embeddings"},
    "index": {"type": "integer", "minimum": 0},
    "embeddings": {"anyOf": [*_MATRICES.values(), {**_object({}, _MATRICES), "minProperties": 2}]},
}

EmbeddingResponse = _object(
    {
        "model": _STRING,
        "object": {"const": "list"},
        "usage": {"anyOf": _USAGES},
        "data": {
            "anyOf": [
                _list(_object(_EMBEDDING), minItems=1),
                _list(_object(_MULTI_EMBEDDING, {"tokenized_input": _list(_STRING)}), minItems=1),
            ]
        },
    }
)
_OPENAI_ERROR = _object(
    {
        "message": _STRING,
        "type": {"enum": ["invalid_request_error", "server_error"]},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
)
ErrorResponse = _object(
    {"detail": {"type": "string", "minLength": 1}, "request_id": _STRING, "error": _OPENAI_ERROR}, {"code": _STRING}
)
HTTPValidationError = _object(
    {
        "detail": {"type": "string", "minLength": 1},
        "request_id": _STRING,
        "errors": _list(
            _object(
                {
                    "field": {"type": "string", "pattern": "^(body|query)"},
                    "message": _STRING,
                    "type": _STRING,
                    "input": {},
                }
            ),
            minItems=1,
        ),
        "error": _OPENAI_ERROR,
    }
)
RerankingResponse = _object(
    {
        "model": _STRING,
        "object": {"const": "list"},
        "usage": _object({"total_tokens": _INTEGER}),
        "results": _list(
            _object(
                {"index": {"type": "integer", "minimum": 0}, "relevance_score": {"type": "number"}},
                {"document": {"type": ["string", "object"]}, "embedding": _list({"type": "number"}, minItems=1)},
            ),
            minItems=1,
        ),
    }
)
ChatCompletion = _object(
    {
        "id": _STRING,
        "object": {"const": "chat.completion"},
        "created": _POSITIVE,
        "model": _STRING,
        "choices": _list(
            _object(
                {
                    "index": {"const": 0},
                    "message": _object({"role": {"const": "assistant"}, "content": _STRING}),
                    "logprobs": {"type": "null"},
                    "finish_reason": {"enum": ["stop", "length"]},
                }
            ),
            minItems=1,
            maxItems=1,
        ),
        "usage": _object(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _POSITIVE)),
    }
)
_SCORES = ("probability", "cosine", "maxsim", "dot")
_PRICES = ("prompt", "completion", "image", "request", "input_cache_read", "input_cache_write")
ModelInfo = _object(
    {
        # The 2026 specification.
        "id": _STRING,
        "hugging_face_id": _STRING,
        "name": _STRING,
        "created": _INTEGER,
        "input_modalities": _list({"enum": ["text", "image", "pdf", "video", "audio"]}, minItems=1),
        "output_modalities": _list({"enum": ["embeddings", "text"]}, minItems=1),
        "quantization": _STRING,
        "context_length": _INTEGER,
        "max_output_length": _INTEGER,
        "pricing": _object(dict.fromkeys(_PRICES, _STRING)),
        "supported_sampling_parameters": _list(_STRING),
        "supported_features": _list(_STRING),
        "description": _STRING,
        "datacenters": _list(_object({"country_code": _STRING})),
        # OpenAI's list.
        "object": {"const": "model"},
        "owned_by": _STRING,
        # The older local reference.
        "type": {"enum": ["embedding", "reranker", "chat"]},
        "max_tokens": _INTEGER,
        "dimensions": {"anyOf": [_INTEGER, {"type": "null"}]},
        "supports_multimodal": _BOOLEAN,
        "tasks": {"anyOf": [_list(_STRING), {"type": "null"}]},
    },
    {"licence": _STRING, "score": {"enum": [*_SCORES, None]}, "alias_of": _STRING},
)
ModelListResponse = _object({"object": {"const": "list"}, "data": _list(ModelInfo)})
_SCORE = {"type": "number", "minimum": 0, "maximum": 1}
_SCORED_LABELS = _list(_object({"label": _STRING, "score": _SCORE}), minItems=1)
_BASE_USAGE = _object({"total_tokens": {"type": "integer", "minimum": 1}})


def _by_group(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "object", "additionalProperties": schema, "minProperties": 1}]}


ClassificationResponse = _object(
    {
        "usage": _BASE_USAGE,
        "data": _list(
            _object(
                {
                    "object": {"const": "classification"},
                    "index": {"type": "integer", "minimum": 0},
                    "prediction": _by_group(_STRING),
                    "score": _by_group(_SCORE),
                    "predictions": _by_group(_SCORED_LABELS),
                }
            ),
            minItems=1,
        ),
    }
)
_UUID = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
_INSTANT = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$"}
_COUNT = {"type": "integer", "minimum": 0}
TrainingResponse = _object(
    {"classifier_id": _UUID, "num_samples": {"type": "integer", "minimum": 1}, "usage": _BASE_USAGE}
)
ClassifierSummary = _object(
    {
        "classifier_id": _UUID,
        "user_id": _UUID,
        "model": _STRING,
        "labels": _list(_STRING, minItems=2),
        "access": {"enum": ["public", "private"]},
        "updated_number": _COUNT,
        "used_number": _COUNT,
        "created_at": _INSTANT,
        "updated_at": _INSTANT,
        "used_at": {"anyOf": [_INSTANT, {"type": "null"}]},
        "is_active": _BOOLEAN,
        "is_latest": _BOOLEAN,
        "metadata_": {"type": "object"},
    }
)
ClassifierList = _list(ClassifierSummary)
OwnedClassifierList = _object(
    {
        "object": {"const": "list"},
        "data": _list(_object({**ClassifierSummary["properties"], "key_id": {"type": ["string", "null"]}})),
    }
)
Deleted = _object({"classifier_id": _UUID, "object": {"const": "classifier"}, "deleted": {"const": True}})
_MOMENT = {"type": ["string", "null"], "format": "date-time"}
_KEY = {
    "object": {"const": "key"},
    "id": {"type": "string", "pattern": "^[A-Za-z0-9]{12}$"},
    "name": _STRING,
    "tier": _STRING,
    "balance": {"type": ["integer", "null"], "minimum": 0},
    "admin": _BOOLEAN,
    "state": {"enum": ["active", "revoked", "expired"]},
    **dict.fromkeys(("created_at", "expires_at", "revoked_at", "last_used_at"), _MOMENT),
}
KeyInfo = _object(_KEY)
NewKey = _object({**_KEY, "key": {"type": "string", "pattern": "^jina_[A-Za-z0-9]{60}$"}})
KeyList = _object({"object": {"const": "list"}, "data": _list(KeyInfo)})
_USAGE_LINE = _object(
    {**dict.fromkeys(("key_id", "day", "model", "endpoint"), _STRING), "requests": _INTEGER, "tokens": _INTEGER}
)
UsageList = _object({"object": {"const": "list"}, "data": _list(_USAGE_LINE)})
_LIMITS = dict.fromkeys(("requests_per_minute", "tokens_per_minute", "concurrency"), _INTEGER)
Account = _object(
    {
        "object": {"const": "account"},
        "key": {"anyOf": [KeyInfo, {"type": "null"}]},
        "limits": _object(_LIMITS),
        "usage": _list(_USAGE_LINE),
    }
)
_ACCOUNTS = {"/v1/me": Account}


def conforms(response: httpx.Response) -> None:
    """Check an answer against its schema and against what holds between body, headers and status."""
    response.read()
    request_id = response.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", request_id), request_id
    if response.request.method == "HEAD":
        return
    path = response.request.url.path
    if response.is_error:
        schema = HTTPValidationError if response.status_code == 422 else ErrorResponse
        _check(response.json(), schema)
        assert response.json()["request_id"] == request_id
        assert response.json()["error"]["message"] == response.json()["detail"]
        assert response.json()["error"]["code"] == response.json().get("code")
        assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
    elif path in ("/v1/embeddings", "/v1/multi-vector", "/v1/multi-embeddings"):
        _check(response.json(), EmbeddingResponse)
        _check_embeddings(response.json())
        assert response.headers["x-truncated-inputs"].isdecimal()
    elif path == "/v1/classify":
        _check(response.json(), ClassificationResponse)
        _check_classification(response.json())
        assert response.headers["x-truncated-inputs"].isdecimal()
    elif path == "/v1/train":
        _check(response.json(), TrainingResponse)
        assert response.headers["x-truncated-inputs"].isdecimal()
    elif path == "/v1/classifiers":
        _check(response.json(), ClassifierList)
    elif path == "/v1/admin/classifiers":
        _check(response.json(), OwnedClassifierList)
    elif path.startswith(("/v1/classifiers/", "/v1/admin/classifiers/")):
        _check(response.json(), Deleted)
    elif path in _ACCOUNTS:
        _check(response.json(), _ACCOUNTS[path])
    elif path in ("/v1/rerank", "/v2/rerank"):
        _check(response.json(), RerankingResponse)
        _check_ranking(response.json())
        assert response.headers["x-truncated-inputs"].isdecimal()
    elif path == "/v1/chat/completions":
        if response.headers["content-type"] == "application/json":
            _check(response.json(), ChatCompletion)
    elif path == "/v1/models":
        _check(response.json(), ModelListResponse)
    elif path.startswith("/v1/models/"):
        _check(response.json(), ModelInfo)


def _check(body: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema).validate(body)


def _check_embeddings(body: dict[str, Any]) -> None:
    assert list(body) == ["model", "object", "usage", "data"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage.get("prompt_tokens", usage.get("input_tokens"))
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))


def _check_classification(body: dict[str, Any]) -> None:
    assert list(body) == ["usage", "data"]
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    for item in body["data"]:
        assert list(item) == ["object", "index", "prediction", "score", "predictions"]
        if isinstance(item["prediction"], str):
            groups = [(item["prediction"], item["score"], item["predictions"])]
        else:
            assert list(item["prediction"]) == list(item["score"]) == list(item["predictions"])
            keys = ("prediction", "score", "predictions")
            groups = [tuple(item[key][name] for key in keys) for name in item["prediction"]]
        for prediction, score, predictions in groups:
            labels = [one["label"] for one in predictions]
            assert len(set(labels)) == len(labels)
            assert abs(sum(one["score"] for one in predictions) - 1) < 1e-4
            assert score == max(one["score"] for one in predictions)
            assert {"label": prediction, "score": score} in predictions


def _check_ranking(body: dict[str, Any]) -> None:
    assert list(body) == ["model", "object", "usage", "results"]
    results = body["results"]
    scores = [result["relevance_score"] for result in results]
    assert scores == sorted(scores, reverse=True), "the best first"
    assert len({result["index"] for result in results}) == len(results)
    for result in results:
        known = ["index", "relevance_score", "document", "embedding"]
        assert list(result) == [key for key in known if key in result]
        assert result["relevance_score"] == round(result["relevance_score"], 8)
