"""`POST /v1/rerank` with images on either side: by the reranker that reads both, and by vectors of both."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.checkpoints.clip import WIDTH, clip, picture
from tests.checkpoints.qwen_vl import qwen_vl
from tests.contract.schemas import conforms
from tests.inprocess import Api, running

M0, CLIP = "jina-reranker-m0", "jina-clip-v2"


def encoded(height: int, width: int) -> str:
    file = io.BytesIO()
    Image.fromarray(picture(height, width)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


FIRST, SECOND = encoded(60, 90), encoded(85, 56)
DOCUMENTS: list[Any] = ["the search", {"image": FIRST, "id": 7}, {"text": "a"}, {"image": SECOND}, {"image": FIRST}]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("images")
    named = [f"{M0}={qwen_vl(root / 'm0', 'm0')}", f"{CLIP}={clip(root / 'clip')}"]
    with running(root, dims={CLIP: WIDTH}, models=named, preload=False, dtype="float32") as api:
        yield api


def post(api: Api, path: str, **fields: Any) -> httpx.Response:
    answer = api.run(api.client.post(path, json=fields))
    conforms(answer)
    return answer


def scores(api: Api, model: str, query: Any, documents: list[Any]) -> list[float]:
    answer = post(api, "/v1/rerank", model=model, query=query, documents=documents)
    assert answer.status_code == 200, answer.text
    found = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    return [found[place] for place in range(len(documents))]


def test_clients_of_clip_may_say_what_a_text_is_for(api: Api) -> None:
    def vector(**asked: str) -> Any:
        answer = post(api, "/v1/embeddings", model=CLIP, input=["the search"], **asked)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    assert vector(task="retrieval.passage") == vector(task="text-matching") == vector()
    assert vector(task="retrieval.query") != vector()
    assert post(api, "/v1/embeddings", model=CLIP, input=["the search"], task="code.query").status_code == 422


@pytest.mark.parametrize("model", [M0, CLIP])
@pytest.mark.parametrize("query", ["what people mean", {"image": SECOND}, f"data:image/png;base64,{SECOND}"])
def test_texts_and_images_rank_together_as_they_do_alone(api: Api, model: str, query: Any) -> None:
    found = scores(api, model, query, DOCUMENTS)
    assert found[1] == found[4]
    np.testing.assert_allclose(found, [scores(api, model, query, [one])[0] for one in DOCUMENTS], atol=1e-5)


@pytest.mark.parametrize("model", [M0, CLIP])
@pytest.mark.parametrize("field", ["query", "documents"])
def test_an_image_beside_a_text_is_refused_and_not_left_out(api: Api, model: str, field: str) -> None:
    both = {"text": "a", "image": FIRST}
    fields: dict[str, Any] = {"query": "a", "documents": ["b"]} | {field: both if field == "query" else ["b", both]}
    answer = post(api, "/v1/rerank", model=model, **fields)
    assert answer.status_code == 422
    place = "body -> query" if field == "query" else "body -> documents -> 1"
    assert answer.json()["errors"][0]["field"] == place
    beside = {"text": "a", "url": "https://example.org/a", "image": None}
    assert scores(api, model, "a", [beside]) == scores(api, model, "a", ["a"])


def test_a_data_uri_is_the_image_that_it_holds(api: Api) -> None:
    named, bare = {"image": SECOND}, f"data:image/png;base64,{SECOND}"
    assert scores(api, M0, bare, [named]) == scores(api, M0, named, [bare])


def test_only_so_much_of_a_text_is_read_as_is_asked_for(api: Api) -> None:
    fields = {"model": M0, "query": "the search engine", "documents": ["in the inner city"]}
    asked = {"max_doc_length": 2, "max_query_length": 1, "truncation": False}  # what is cut so is not missed
    answers = [post(api, "/v1/rerank", **fields, **more) for more in ({}, asked, {**asked, "max_query_length": 512})]
    assert [answer.headers["x-truncated-inputs"] for answer in answers] == ["0", "1", "1"]
    whole, short, half = (answer.json()["results"][0]["relevance_score"] for answer in answers)
    assert len({whole, short, half}) == 3


def test_clip_ranks_by_the_cosine_of_its_vectors(api: Api) -> None:
    def vectors(**fields: Any) -> np.ndarray:
        data = post(api, "/v1/embeddings", model=CLIP, **fields).json()["data"]
        return np.array([item["embedding"] for item in data])

    query = vectors(input=["what people mean"], task="retrieval.query")[0]
    found = scores(api, CLIP, "what people mean", DOCUMENTS)
    np.testing.assert_allclose(found, vectors(input=DOCUMENTS) @ query, atol=1e-5)


def test_documents_are_repeated_as_they_were_sent(api: Api) -> None:
    results = post(api, "/v1/rerank", model=M0, query="a", documents=DOCUMENTS).json()["results"]
    repeated = {result["index"]: result["document"] for result in results}
    assert repeated[1] == {"image": FIRST, "id": 7}
    assert post(api, "/v1/rerank", model=M0, query="a", documents=[FIRST], return_documents=False).is_success


@pytest.mark.parametrize(
    ("model", "fields", "place", "words"),
    [
        (M0, {"documents": ["a", {"pdf": "AAAA"}]}, "documents -> 1", "A PDF is several images"),
        (CLIP, {"documents": [{"pdf": "AAAA"}]}, "documents -> 0", "A PDF is several images"),
        (M0, {"query": {"audio": "AAAA"}}, "query", "ranks text and image. Models served here that rank audio"),
        (M0, {"documents": ["a", {"image": "AAAA"}]}, "documents -> 1", ""),
        (M0, {"documents": ["a", {"image": "not base64!"}]}, "documents -> 1", ""),
    ],
)
def test_what_cannot_be_read_is_refused_at_its_place(
    api: Api, model: str, fields: dict[str, Any], place: str, words: str
) -> None:
    answer = post(api, "/v1/rerank", **{"model": model, "query": "a", "documents": ["a"], **fields})
    assert answer.status_code == 422, answer.text
    fault = answer.json()["errors"][0]
    assert fault["field"].startswith(f"body -> {place}")
    assert words in fault["message"]
