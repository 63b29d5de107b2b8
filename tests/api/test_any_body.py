"""Whatever JSON arrives, the answer is right or a refusal, never a failure of ours."""

import gc
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fundament.api.body import _parsed
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

FIELDS = [
    "model",
    "input",
    "task",
    "dimensions",
    "normalized",
    "truncate",
    "embedding_type",
    "encoding_format",
    "late_chunking",
    "return_multivector",
    "return_tokenized_input",
    "return_sparse",
    "input_type",
]
PARTS = ["text", "image", "url", "bytes", "content"]

words = st.sampled_from([MODEL, "float", "base64", "retrieval.query", "", "a b c"]) | st.text(max_size=40)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | words
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(PARTS) | words, inner, max_size=3),
    max_leaves=8,
)
requests = st.fixed_dictionaries({"model": st.just(MODEL), "input": values}, optional=dict.fromkeys(FIELDS[2:], values))
bodies = (requests | st.dictionaries(st.sampled_from(FIELDS) | words, values, max_size=5) | values).map(orjson.dumps)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("data")) as api:
        yield api


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(content=bodies | st.binary(max_size=200))
@example(content=orjson.dumps({"model": MODEL, "input": "x", "embedding_type": [{}, []]}))
@example(content=orjson.dumps({"model": MODEL, "input": [{"content": []}]}))
def test_any_body_is_answered_or_refused(api: Api, content: bytes) -> None:
    response = api.post(content)
    assert response.status_code < 500
    conforms(response)


RERANK_FIELDS = [
    "query",
    "documents",
    "model",
    "top_n",
    "top_k",
    "return_documents",
    "truncation",
    "max_doc_length",
    "max_tokens_per_doc",
    "max_query_length",
    "instruction",
    "rank_fields",
    "return_embeddings",
    "return_multivector",
    "return_sparse",
]
rankings = st.fixed_dictionaries(
    {"query": words, "documents": st.lists(words | values, max_size=4)},
    optional=dict.fromkeys(RERANK_FIELDS[2:], values),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(content=rankings | st.dictionaries(st.sampled_from(RERANK_FIELDS) | words, values, max_size=5) | values)
@example(content={"query": {"text": {"text": "x"}}, "documents": [{"text": ["x"]}]})
@example(content={"query": "x", "documents": [{"text": "x", "url": 5, "": [{}]}], "top_n": 2**63})
def test_any_ranking_is_answered_or_refused(api: Api, content: object) -> None:
    response = api.run(api.client.post("/v1/rerank", content=orjson.dumps(content)))
    assert response.status_code < 500
    conforms(response)


@settings(deadline=None, max_examples=50)
@given(query=st.text(max_size=60), documents=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_documents_have_scores(api: Api, query: str, documents: list[str]) -> None:
    response = api.run(api.client.post("/v1/rerank", json={"query": query, "documents": documents}))
    assert response.status_code == 200
    conforms(response)
    assert sorted(result["index"] for result in response.json()["results"]) == list(range(len(documents)))


@settings(deadline=None, max_examples=50)
@given(
    texts=st.lists(st.text(max_size=60) | st.fixed_dictionaries({"text": st.text(max_size=60)}), min_size=1, max_size=5)
)
def test_any_texts_have_vectors(api: Api, texts: list[Any]) -> None:
    response = api.post(orjson.dumps({"model": MODEL, "input": texts}))
    assert response.status_code == 200
    conforms(response)
    assert len(response.json()["data"]) == len(texts)


@settings(deadline=None, max_examples=50)
@given(header=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30))
def test_any_content_type_is_answered_or_refused(api: Api, header: str) -> None:
    response = api.post(orjson.dumps({"model": MODEL, "input": "x"}), **{"content-type": header})
    assert response.status_code in (200, 415)
    conforms(response)


def test_the_garbage_collector_rests_while_a_body_is_parsed() -> None:
    phases: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        del info
        phases.append(phase)

    gc.callbacks.append(note)
    try:
        found = _parsed(b"[" + b"[]," * 100_000 + b"[]]")
        while_parsing = len(phases)
    finally:
        gc.callbacks.remove(note)
    assert len(found) == 100_001
    assert while_parsing == 0
    with pytest.raises(orjson.JSONDecodeError):
        _parsed(b"[")
    assert gc.isenabled()
