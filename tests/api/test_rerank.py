"""`POST /v1/rerank` on every kind of model: which scores, in which order, of which fields."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from fundament.api import similarity
from fundament.api.rerank import RerankRequest, rerank, write
from fundament.api.similarity import rank_by_vectors, slices
from fundament.api.state import State
from fundament.catalog import CATALOG, ModelSpec
from fundament.core import Call, Embed, Embeddings, Ranking, Rerank
from fundament.errors import Fault, InputError, ModelNotFoundError, TooLongError
from tests.checkpoints import resave
from tests.checkpoints.bge_m3 import bge_m3
from tests.checkpoints.colbert import colbert_v2
from tests.checkpoints.cross_encoder import bert_ranker
from tests.checkpoints.splade import splade
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL, metrics_of

QUERY = "what the search finds"
DOCUMENTS: list[Any] = ["the search engine", {"text": "a", "url": "https://x/y"}, "", "naïve 東京", "a", "the the"]
TEXTS = [document if isinstance(document, str) else document["text"] for document in DOCUMENTS]
RANKERS = ("pairs", "colbert", "bge", "sparse", MODEL)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("rerank")
    splade(folder / "sparse", "bert")
    models = {
        "pairs": bert_ranker(folder / "pairs"),
        "colbert": resave(colbert_v2(folder / "colbert"), config={"max_position_embeddings": 300}),
        "bge": bge_m3(folder / "bge"),
        "sparse": folder / "sparse",
    }
    named = [f"{name}={path}" for name, path in models.items()]
    with running(folder / "data", models=[*named, MODEL], dtype="float32") as api:
        yield api


def post(api: Api, model: str | None, *, path: str = "/v1/rerank", **fields: Any) -> httpx.Response:
    asked = {"query": QUERY, "documents": DOCUMENTS} if path == "/v1/rerank" else {}
    named = {} if model is None else {"model": model}
    answer = api.run(api.client.post(path, json={**named, **asked, **fields}))
    api.run(answer.aread())
    conforms(answer)
    return answer


def scores(answer: httpx.Response) -> list[float]:
    """In the order of the documents."""
    assert answer.status_code == 200, answer.text
    found = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    return [found[index] for index in range(len(found))]


def items(api: Api, model: str, texts: list[str], **fields: Any) -> list[Any]:
    """What the embeddings endpoint gives for these texts."""
    data = post(api, model, path="/v1/embeddings", input=texts, normalized=False, truncate=True, **fields).json()[
        "data"
    ]
    values = (item[item["object"]] for item in data)
    return [np.array(value) if isinstance(value, list) else value for value in values]


def cosines(query: np.ndarray, documents: list[np.ndarray]) -> list[float]:
    return [float(query @ one / np.linalg.norm(query) / np.linalg.norm(one)) for one in documents]


def maxsims(query: np.ndarray, documents: list[np.ndarray]) -> list[float]:
    """Token by token."""
    return [sum(max(cosines(token, list(one))) for token in query) for one in documents]


@pytest.mark.parametrize("model", [MODEL, "bge"])
def test_an_embedding_model_scores_by_cosine(api: Api, model: str) -> None:
    [query], documents = items(api, model, [QUERY]), items(api, model, TEXTS)
    np.testing.assert_allclose(scores(post(api, model)), cosines(query, documents), atol=1e-6)


@pytest.mark.parametrize(("model", "fields"), [("colbert", {}), ("bge", {"return_multivector": True})])
def test_late_interaction_scores_by_maxsim(api: Api, model: str, fields: dict[str, Any]) -> None:
    [query] = items(api, model, [QUERY], input_type="query", **fields)
    documents = items(api, model, TEXTS, input_type="document", **fields)
    found = scores(post(api, model, **fields))
    np.testing.assert_allclose(found, maxsims(query, documents), atol=1e-4)
    assert max(found) > 1, "the raw sum"


@pytest.mark.parametrize(("model", "fields"), [("sparse", {}), ("bge", {"return_sparse": True})])
def test_weights_of_tokens_score_by_their_product(api: Api, model: str, fields: dict[str, Any]) -> None:
    [query], documents = items(api, model, [QUERY], **fields), items(api, model, TEXTS, **fields)
    expected = [sum(weight * one.get(token, 0) for token, weight in query.items()) for one in documents]
    np.testing.assert_allclose(scores(post(api, model, **fields)), expected, rtol=1e-5)


@pytest.mark.parametrize("model", RANKERS)
def test_documents_come_back_as_they_were_sent(api: Api, model: str) -> None:
    for result in post(api, model).json()["results"]:
        assert result["document"] == DOCUMENTS[result["index"]]
    for result in post(api, model, return_documents=False).json()["results"]:
        assert list(result) == ["index", "relevance_score"]
    assert post(api, model, return_documents=None).content == post(api, model).content


@pytest.mark.parametrize("model", RANKERS)
def test_the_best_come_first_and_the_rest_may_be_left_out(api: Api, model: str) -> None:
    results = post(api, model).json()["results"]
    assert len(results) == len(DOCUMENTS)
    for fields in ({"top_n": 2}, {"top_k": 2}, {"top_n": 2, "top_k": 5}):
        assert post(api, model, **fields).json()["results"] == results[:2]
    for fields in ({"top_n": None}, {"top_n": 999}, {"top_n": 2**62}):
        assert post(api, model, **fields).json()["results"] == results


@pytest.mark.parametrize("model", RANKERS)
def test_equal_documents_have_equal_scores_in_the_callers_order(api: Api, model: str) -> None:
    documents = ["a", "b", {"text": "a"}, "search", "a"]
    results = post(api, model, documents=documents).json()["results"]
    equal = [result for result in results if result["index"] in (0, 2, 4)]
    assert [result["index"] for result in equal] == [0, 2, 4]
    assert len({result["relevance_score"] for result in equal}) == 1


@pytest.mark.parametrize("model", RANKERS)
def test_shuffled_documents_keep_their_scores(api: Api, model: str) -> None:
    order = [3, 5, 0, 2, 4, 1]
    shuffled = scores(post(api, model, documents=[DOCUMENTS[place] for place in order]))
    expected = scores(post(api, model))
    np.testing.assert_allclose(shuffled, [expected[place] for place in order], atol=1e-4)


@pytest.mark.parametrize("model", RANKERS)
def test_a_query_may_be_an_object(api: Api, model: str) -> None:
    assert post(api, model, query={"text": QUERY, "from": "a form"}).content == post(api, model).content


@pytest.mark.parametrize("model", RANKERS)
def test_what_is_longer_than_the_model_reads_is_cut_unless_that_is_refused(api: Api, model: str) -> None:
    documents = ["a", "the search " * 1000, "a"]
    answer = post(api, model, documents=documents)
    assert answer.headers["x-truncated-inputs"] == "1"
    for name in ("truncation", "truncate"):
        assert post(api, model, documents=documents, **{name: True}).content == answer.content
        refused = post(api, model, documents=documents, **{name: False})
        assert refused.status_code == 400
        assert refused.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
        assert refused.json()["detail"].startswith("Document 1 has ")
    refused = post(api, model, query="the search " * 1000, truncate=False)
    assert refused.json()["detail"].startswith("The query has ")


@pytest.mark.parametrize("model", RANKERS)
def test_of_a_very_long_document_or_query_a_beginning_is_looked_at(api: Api, model: str) -> None:
    long, shorter = "the search " * 100_000, "the search " * 20_000
    for longs, shorters in (({"documents": [long]}, {"documents": [shorter]}), ({"query": long}, {"query": shorter})):
        refused = post(api, model, **longs, truncation=False)
        assert refused.status_code == 400
        assert " has more than " in refused.json()["detail"]
        assert scores(post(api, model, **longs)) == scores(post(api, model, **shorters))


def test_documents_are_cut_to_the_tokens_asked_for(api: Api) -> None:
    documents = ["the search engine", "a b c d"]
    expected = scores(post(api, "pairs", documents=["the", "a"]))
    for name in ("max_doc_length", "max_tokens_per_doc"):
        assert scores(post(api, "pairs", documents=documents, **{name: 1})) == pytest.approx(expected)
        assert post(api, MODEL, documents=documents, **{name: 8192}).status_code == 200
    one_word = scores(post(api, "pairs", query="the", documents=["a"]))
    assert scores(post(api, "pairs", query="the a b", documents=["a"], max_query_length=1)) == pytest.approx(one_word)


def test_usage_counts_what_is_read(api: Api) -> None:
    assert post(api, "pairs", query="a b", documents=["c", "d e", "c"]).json()["usage"] == {"total_tokens": 6 + 7}
    assert post(api, MODEL, query="a b", documents=["c", "d e", "c"]).json()["usage"] == {"total_tokens": 4 + 3 + 4}


@pytest.mark.parametrize(
    ("model", "fields", "place", "words"),
    [
        (MODEL, {"instruction": "x"}, "instruction", "does not take it. Models served here that do: none"),
        (MODEL, {"return_embeddings": True}, "return_embeddings", "does not take it"),
        (MODEL, {"max_doc_length": 255}, "max_doc_length", "Models served here that do: pairs"),
        (MODEL, {"max_query_length": 1}, "max_query_length", "Models served here that do: pairs"),
        (MODEL, {"return_multivector": True}, "return_multivector", "does not score so"),
        ("pairs", {"return_sparse": True}, "return_sparse", "does not score so"),
        ("pairs", {"instruction": "x"}, "instruction", "does not take it"),
        ("colbert", {"return_sparse": True}, "return_sparse", "does not score so"),
        ("bge", {"return_sparse": True, "return_multivector": True}, "return_sparse", "ask for one of them"),
        ("pairs", {"max_doc_length": 0}, "max_doc_length", "greater than or equal to 1"),
        ("pairs", {"max_doc_length": 8193}, "max_doc_length", "less than or equal to 8192"),
        ("pairs", {"top_n": 0}, "top_n", "greater than or equal to 1"),
        ("pairs", {"top_n": "3"}, "top_n", "integer"),
        ("pairs", {"documents": []}, "documents", "at least 1"),
        ("pairs", {"documents": "x"}, "documents", "list of documents"),
        ("pairs", {"documents": None}, "documents", "list of documents"),
        ("pairs", {"documents": ["a", None]}, "documents -> 1", "string or an object"),
        ("pairs", {"documents": ["a", {}]}, "documents -> 1", "exactly one of text"),
        ("pairs", {"documents": ["a", {"text": None, "id": 1}]}, "documents -> 1", "exactly one of text"),
        ("pairs", {"documents": [{"text": 5}]}, "documents -> 0 -> text", "string"),
        ("pairs", {"documents": ["a", {"image": "AAAA"}]}, "documents -> 1", "ranks text only"),
        (MODEL, {"documents": [{"url": "https://x/y.png"}]}, "documents -> 0", "rank image input: none"),
        (MODEL, {"query": {"image": "AAAA"}}, "query", "ranks text only"),
        (MODEL, {"query": None}, "query", "string or an object"),
        (MODEL, {"query": ["x"]}, "query", "string or an object"),
        (MODEL, {"documents": ["x"] * 10_001}, "documents", "at most 10000"),
        (MODEL, {"documents": [5] * 10_001}, "documents", "at most 10000"),  # before any of them is looked at
    ],
)
def test_what_a_model_does_not_take_is_refused(
    api: Api, model: str, fields: dict[str, Any], place: str, words: str
) -> None:
    answer = post(api, model, **fields)
    assert answer.status_code == 422
    fault = answer.json()["errors"][0]
    assert fault["field"] == f"body -> {place}"
    assert words in fault["message"]


def test_a_field_that_asks_for_nothing_is_taken_by_every_model(api: Api) -> None:
    nothing = {"instruction": None, "return_embeddings": False, "max_doc_length": None, "return_sparse": False}
    for model in RANKERS:
        assert post(api, model, **nothing, rank_fields=["text"], user="me").content == post(api, model).content


def test_a_request_without_a_model_means_the_only_reranker(api: Api) -> None:
    answer = post(api, None)
    assert answer.json() == post(api, "pairs").json()
    assert answer.json()["model"] == "pairs"


def test_the_list_of_models_says_what_each_ones_scores_are(api: Api) -> None:
    listed = api.run(api.client.get("/v1/models")).json()["data"]
    assert {model["id"]: model["score"] for model in listed} == {
        "pairs": "probability",
        "colbert": "maxsim",
        "bge": "cosine",
        "sparse": "dot",
        MODEL: "cosine",
    }


def test_other_endpoints_refuse_a_reranker(api: Api) -> None:
    refused = post(api, "pairs", path="/v1/embeddings", input="x")
    assert refused.status_code == 422
    assert "is a reranker model, not an embedding model" in refused.json()["detail"]


@pytest.mark.parametrize("model", ["pairs", "bge"])
def test_a_short_request_does_not_wait_for_a_long_one(api: Api, model: str) -> None:
    """Rows of both share the model's time, so the short one is answered while the long one still waits."""
    words = {"0": "the ", "1": "search "}
    different = ["".join(words[digit] for digit in f"{number:011b}") * 5 for number in range(2_000)]
    long = {"model": model, "query": QUERY, "documents": different}
    short = {"model": model, "query": QUERY, "documents": ["a"]}

    async def overtakes() -> bool:
        slow = asyncio.ensure_future(api.client.post("/v1/rerank", json=long))
        while metrics_of((await api.client.get("/metrics")).text)["fundament_rows_waiting"] < 50:
            await asyncio.sleep(0.001)
        assert (await api.client.post("/v1/rerank", json=short)).status_code == 200
        first = not slow.done()
        assert (await slow).status_code == 200
        return first

    assert api.run(overtakes())


@dataclass
class Recorder:
    """An engine that notes what it is asked, and answers with vectors made of each text's length."""

    calls: list[Call] = field(default_factory=list)
    failing: Exception | None = None

    async def run(self, model: str, call: Any, **_: Any) -> Any:
        self.calls.append(call)
        if isinstance(call, Rerank):
            n = len(call.documents)
            vectors = np.eye(n, 4, dtype=np.float32) if call.embeddings else None
            return Ranking(scores=np.arange(n, dtype=np.float32) - 0.5, embeddings=vectors, n_tokens=7)
        if self.failing and call.role == "document":
            raise self.failing
        vectors = np.array([[1.0, len(text)] for text in call.texts], dtype=np.float32)
        return Embeddings(vectors=vectors, n_tokens=len(call.texts))

    def embeds(self) -> list[Embed]:
        return [call for call in self.calls if isinstance(call, Embed)]


def ranked(engine: Recorder, spec: ModelSpec, documents: list[str]) -> Ranking:
    return asyncio.run(rank_by_vectors(engine, spec, Rerank(query="q", documents=documents), "dense"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "query", "document"),
    [
        ("jina-embeddings-v2-base-en", None, None),
        ("jina-embeddings-v3", "retrieval.query", "retrieval.passage"),
        ("jina-embeddings-v5-text-nano", "retrieval.query", "retrieval.passage"),
        ("qwen3-embedding-0.6b", "retrieval.query", "retrieval.passage"),
        ("jina-code-embeddings-0.5b", "nl2code.query", "nl2code.passage"),
        ("jina-clip-v2", "retrieval.query", None),
    ],
)
def test_queries_and_documents_have_the_models_own_tasks(model: str, query: str | None, document: str | None) -> None:
    engine = Recorder()
    ranked(engine, CATALOG[model], ["a", "b"])
    found = [(call.task, call.role, call.texts) for call in engine.embeds()]
    assert found == [(query, "query", ["q"]), (document, "document", ["a", "b"])]


def test_many_documents_go_in_slices_and_the_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_SLICE_DOCUMENTS", 4)
    monkeypatch.setattr(similarity, "_SLICE_CHARACTERS", 10)
    engine, documents = Recorder(), ["a" * n for n in (1, 2, 3, 30, 1, 9, 5, 2, 4, 6, 0, 3, 7, 8)]
    made = ranked(engine, CATALOG[MODEL], documents)
    first, *others = engine.embeds()
    assert first.texts == ["q"]
    assert [text for call in others for text in call.texts] == list(dict.fromkeys(documents))
    for call in others:
        assert len(call.texts) <= 4
        assert len(call.texts) == 1 or sum(map(len, call.texts)) <= 10
    expected = cosines(np.array([1.0, 1.0]), [np.array([1.0, len(text)]) for text in documents])
    np.testing.assert_allclose(made.scores, expected, atol=1e-6)
    assert made.n_tokens == 1 + len(set(documents))


def test_slices_cover_all_documents() -> None:
    assert list(slices(["a"])) == [slice(0, 1)]
    assert [(part.start, part.stop) for part in slices(["a"] * 600)] == [(0, 256), (256, 512), (512, 600)]
    assert [(part.start, part.stop) for part in slices(["a" * 200_000] * 3)] == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TooLongError(index=0, n_tokens=9, limit=8), "Document 2 has 9 tokens"),
        (InputError(Fault("body -> input -> 0", "no tokens")), "documents -> 2: no tokens"),
        (InputError(Fault("body -> task", "none")), "task: none"),
        (ModelNotFoundError("gone"), "gone"),
    ],
)
def test_a_fault_names_the_document_of_the_request(error: Exception, words: str) -> None:
    class Late(Recorder):
        async def run(self, model: str, call: Any, **fields: Any) -> Any:
            self.failing = error if "b" in call.texts else None
            return await super().run(model, call, **fields)

    with pytest.raises(type(error), match=words), pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_SLICE_DOCUMENTS", 1)
        ranked(Late(), CATALOG[MODEL], ["a", "a", "b"])


def state_of_models(api: Api, engine: Recorder, *models: str) -> State:
    """The application's state with another engine, which answers for these models of the catalogue."""
    parts: State = api.app.state.parts
    served = {model: CATALOG[model] for model in models}
    return replace(parts, engine=engine, served=lambda: served)


def asked(state: State, **fields: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(await write(await rerank(state, RerankRequest.model_validate(fields))))
        return found

    return asyncio.run(run())


def test_documents_of_scores_that_are_equal_as_written_are_in_the_models_order(api: Api) -> None:
    class Sure(Recorder):
        async def run(self, model: str, call: Any, **_: Any) -> Any:
            return Ranking(scores=1 - np.array([3e-10, 1e-10, 2e-10]))

    found = asked(state_of_models(api, Sure(), "bge-reranker-v2-m3"), query="q", documents=["a", "b", "c"], top_n=2)[
        "results"
    ]
    assert [(result["index"], result["relevance_score"]) for result in found] == [(1, 1.0), (2, 1.0)]


def test_a_listwise_reranker_is_given_every_field(api: Api) -> None:
    engine = Recorder()
    body = asked(
        state_of_models(api, engine, "jina-reranker-v3"),
        query={"text": "q"},
        documents=["a", {"text": "b", "id": 3}],
        instruction="why",
        max_doc_length=5,
        max_query_length=6,
        return_embeddings=True,
        truncate=False,
    )
    assert engine.calls == [
        Rerank(
            query="q",
            documents=["a", "b"],
            truncate=False,
            instruction="why",
            max_query_tokens=6,
            max_document_tokens=5,
            embeddings=True,
        )
    ]
    assert body == {
        "model": "jina-reranker-v3",
        "object": "list",
        "usage": {"total_tokens": 7},
        "results": [
            {"index": 1, "relevance_score": 0.5, "document": {"text": "b"}, "embedding": [0, 1, 0, 0]},
            {"index": 0, "relevance_score": -0.5, "document": {"text": "a"}, "embedding": [1, 0, 0, 0]},
        ],
    }


@pytest.mark.parametrize(
    ("served", "meant"),
    [
        (["jina-reranker-v3", "bge-reranker-v2-m3", MODEL], "jina-reranker-v3"),
        (["bge-reranker-v2-m3", MODEL, "bge-m3"], "bge-reranker-v2-m3"),
        ([MODEL], MODEL),
        ([MODEL, "jina-vlm"], MODEL),
        ([MODEL, "bge-m3", "jina-vlm"], None),
        (["bge-reranker-v2-m3", "jina-reranker-v3.5"], None),
        (["jina-vlm"], None),
    ],
)
def test_what_a_request_without_a_model_means(api: Api, served: list[str], meant: str | None) -> None:
    state = state_of_models(api, Recorder(), *served)
    if meant:
        assert asked(state, query="q", documents=["a"])["model"] == meant
        return
    with pytest.raises(InputError) as caught:
        asked(state, query="q", documents=["a"])
    [fault] = caught.value.faults
    assert fault.field == "body -> model"
    assert "jina-vlm" not in fault.message


def test_the_answer_is_called_what_the_caller_called_it(api: Api) -> None:
    state = state_of_models(api, Recorder(), "bge-reranker-v2-m3")
    assert (
        asked(state, model="BAAI/bge-reranker-v2-m3", query="q", documents=["a"])["model"] == "BAAI/bge-reranker-v2-m3"
    )
