"""From a request to rows: every form of media, who takes it, what is fetched, decoded and counted."""

import asyncio
import base64
import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from fundament import media
from fundament.api.embeddings import EmbeddingsRequest, task_of
from fundament.api.inputs import Reference
from fundament.api.jobs import lines, outcomes
from fundament.api.media import check_media, opened
from fundament.app import named_models
from fundament.backbone.device import Placement
from fundament.catalog import CATALOG, EMBEDDED
from fundament.config import Settings
from fundament.core import Array, Embed, Embeddings, Group, Item, Media, Model
from fundament.engine import local
from fundament.engine.weights import Local, embedded
from fundament.errors import InputError
from tests.checkpoints.clip import WIDTH, clip
from tests.checkpoints.qwen_vl import HIDDEN, qwen_vl
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.media.files import BLUE, GREEN, RED, painted, pdf, plain, saved, video, wav
from tests.website import Website, website

CLIP, V4, EYE = "jina-clip-v2", "jina-embeddings-v4", "eye"


class Eye:
    """A model that reads everything and tells what it saw: kind, then amounts. It counts what it decodes."""

    n_bytes = 0

    def __init__(self) -> None:
        self.seen: list[str] = []

    def prepare(self, call: Embed) -> list[Item]:
        read: dict[Media, list[Item]] = {}
        items: list[Item] = []
        for value in call.inputs:
            if isinstance(value, Media):
                if value not in read:
                    read[value] = [self._item(value.kind, each) for each in self._look(value)]
                items += read[value]
            elif isinstance(value, Group):
                parts = [
                    ("text", len(part)) if isinstance(part, str) else (part.kind, *self._look(part))
                    for part in value.parts
                ]
                items.append(self._item("group", np.concatenate([np.ravel(number) for _, number in parts])))
            else:
                items.append(self._item("text", np.array([len(value)])))
        return items

    def _look(self, file: Media) -> list[Array]:
        self.seen.append(file.kind)
        if file.kind == "audio":
            found = media.sound(file, 8000)
            assert found is not None
            return [np.array([len(found)])]
        seen = (frame for frame, _ in media.frames(file, 2)) if file.kind == "video" else media.pictures(file)
        return [picture.mean(axis=(0, 1)) for picture in seen][: 1 if file.kind == "video" else None]

    def _item(self, kind: str, numbers: Array) -> Item:
        vector = np.zeros(8, np.float32)
        vector[: 1 + len(numbers)] = [("text", "image", "pdf", "video", "audio", "group").index(kind), *numbers]
        n_media: Any = {} if kind in ("text", "group") else {"image" if kind == "pdf" else kind: 5}
        return Item(features={"vector": vector}, n_tokens=5, n_counted=5, n_media=n_media)

    def forward(self, items: Sequence[Item]) -> list[Array]:
        return [item.features["vector"] for item in items]

    def finish(self, call: Embed, items: Sequence[Item], arrays: Sequence[Array]) -> Embeddings:
        return Embeddings(vectors=np.stack(arrays))


@pytest.fixture(scope="module")
def site() -> Iterator[Website]:
    with website() as site:
        yield site


@pytest.fixture(scope="module")
def the_eye() -> Eye:
    return Eye()


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, the_eye: Eye) -> Iterator[Api]:
    """A server of the embedded model, a tiny CLIP, and the model of this file."""
    root, there, load = tmp_path_factory.mktemp("media"), embedded(), local.load_model
    assert there is not None
    kinds = ("text", "image", "pdf", "video", "audio")
    spec = replace(EMBEDDED, id=EYE, dim=8, modalities=kinds, groups=True, late_chunking=True)

    def load_any(where: Local, placement: Placement) -> Model[Any, Any]:
        return the_eye if where.spec is spec else load(where, placement)

    def with_the_eye(settings: Settings) -> dict[str, Local]:
        return {**named_models(settings), EYE: Local(spec, there.directory)}

    models = [EMBEDDED.id, f"{CLIP}={clip(root / 'clip')}", f"{V4}={qwen_vl(root / 'v4', 'v4')}"]
    settings = {"models": models, "allowed_networks": ["127.0.0.0/8"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "load_model", load_any)
        patch.setattr("fundament.app.named_models", with_the_eye)
        with running(root, dims={CLIP: WIDTH, V4: HIDDEN}, dtype="float32", max_media=20, **settings) as api:
            yield api


@pytest.fixture
def eye(the_eye: Eye) -> Eye:
    the_eye.seen.clear()
    return the_eye


def ask(api: Api, model: str, given: object, **fields: object) -> httpx.Response:
    body = {"model": model, "input": given, "normalized": False, **fields}
    answer = api.run(api.client.post("/v1/embeddings", json=body))
    conforms(answer)
    assert api.app.state.parts.n_file_bytes == 0
    return answer


def vectors(api: Api, model: str, given: object, **fields: object) -> list[list[float]]:
    answer = ask(api, model, given, **fields)
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


def fault(answer: httpx.Response) -> tuple[str, str]:
    assert answer.status_code == 422, answer.text
    first = answer.json()["errors"][0]
    return first["field"].removeprefix("body -> "), first["message"]


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{text_of(content)}"


def test_every_spelling_of_an_image_is_the_same_image(api: Api, site: Website) -> None:
    content = saved(np.tile(np.arange(60, dtype=np.uint8)[:, None, None], (1, 40, 3)))
    url = site.say("/picture.txt", content, Content_Type="text/plain")
    spellings = [
        {"image": text_of(content)},
        {"image": data_uri(content)},
        {"image": data_uri(content, "application/octet-stream")},
        {"image": url},
        {"url": url},
        {"bytes": text_of(content)},
        data_uri(content),
        {"text": None, "image": url, "note": "ignored"},
    ]
    [expected] = vectors(api, CLIP, spellings[0])
    for found in [*(vectors(api, CLIP, each)[0] for each in spellings), *vectors(api, CLIP, spellings)]:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    [other] = vectors(api, CLIP, {"image": text_of(plain(RED))})
    assert np.abs(np.subtract(other, expected)).max() > 1e-3


def test_texts_and_images_answer_in_the_callers_order(api: Api) -> None:
    mixed = [{"image": text_of(plain(RED))}, "a text", {"image": text_of(plain(BLUE))}, {"text": "another"}]
    together = ask(api, CLIP, mixed).json()
    for index, each in enumerate(mixed):
        [alone] = vectors(api, CLIP, [each])
        np.testing.assert_allclose(together["data"][index]["embedding"], alone, atol=1e-5)
    n_texts = ask(api, CLIP, [mixed[1], mixed[3]]).json()["usage"]["total_tokens"]
    usage = together["usage"]
    assert list(usage) == ["total_tokens", "prompt_tokens", "image_tokens"]
    assert usage["total_tokens"] == n_texts + usage["image_tokens"]
    assert "image_tokens" not in ask(api, CLIP, "a text").json()["usage"]


def test_lines_of_a_job_that_hold_media_are_one_call_and_come_back_apart(api: Api, eye: Eye) -> None:
    red, blue = ({"image": text_of(plain(color))} for color in (RED, BLUE))
    asked = [[red], ["text"], [blue, {"content": [{"text": "a"}, red]}], [blue]]
    raw = b"\n".join(orjson.dumps({"input": given, "normalized": False}) for given in asked)
    state = api.app.state.parts
    read = lines.read(raw, 0, {"model": EYE}, lambda name: state.find(name))
    found = api.run(outcomes.embed_lines(state, read, caller=""))
    bodies = [orjson.loads(line)["response"]["body"] for line in outcomes.output_lines(found)]
    for given, body in zip(asked, bodies, strict=True):
        assert body["data"] == ask(api, EYE, given).json()["data"]
    images = [body["usage"].get("image_tokens") for body in bodies]
    assert images == [5, None, 5, 5]
    assert [body["usage"]["total_tokens"] for body in bodies] == [5, 5, 10, 5]
    alone = ["image"] * 4  # of the requests beside it
    assert eye.seen == ["image"] * 3 + alone  # a file that is named twice is read once


def test_a_pdf_is_one_vector_per_page(api: Api, eye: Eye) -> None:
    content = pdf([painted(RED), painted(GREEN), painted(BLUE)])
    for given in ({"pdf": text_of(content)}, [{"pdf": data_uri(content, "application/pdf")}]):
        answer = ask(api, EYE, given).json()
        assert [item["embedding"][:4] for item in answer["data"]] == [[2, *RED], [2, *GREEN], [2, *BLUE]]
        assert answer["usage"] == {"total_tokens": 15, "prompt_tokens": 15, "image_tokens": 15}
    pages = vectors(api, CLIP, {"pdf": text_of(pdf([painted(RED), painted(BLUE)]))})
    assert len(pages) == 2
    assert pages[0] != pages[1]


def test_a_pdf_goes_alone(api: Api, eye: Eye) -> None:
    page = {"pdf": text_of(pdf([b""]))}
    where, why = fault(ask(api, CLIP, ["a text", page]))
    assert where == "input -> 1"
    assert "Send it alone" in why
    where, why = fault(ask(api, EYE, [{"content": [{"text": "a"}, page]}]))
    assert where == "input -> 0 -> content -> 1 -> pdf"
    assert "Send it alone" in why
    assert not eye.seen


def test_sounds_and_videos_are_read_and_counted(api: Api, eye: Eye) -> None:
    pytest.importorskip("av")
    given = [
        {"audio": text_of(wav(np.zeros(1234)))},
        {"video": text_of(video([7, 9]))},
        "text",
        {"image": text_of(plain(RED))},
    ]
    answer = ask(api, EYE, given).json()
    found = [item["embedding"] for item in answer["data"]]
    assert found[0][:2] == [4, 1234]
    assert found[1][0] == 3
    assert found[2][:2] == [0, 4]
    assert found[3][:4] == [1, *RED]
    assert answer["usage"] == {
        "total_tokens": 20,
        "prompt_tokens": 20,
        "image_tokens": 5,
        "audio_tokens": 5,
        "video_tokens": 5,
    }


def test_a_group_is_one_vector_of_its_parts_in_order(api: Api, eye: Eye) -> None:
    group = [{"text": "abc"}, {"image": text_of(plain(RED))}, {"text": "d"}]
    found = vectors(api, EYE, [{"content": group}, "x", {"content": group[::-1]}])
    assert found == [[5, 3, *RED, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [5, 1, *RED, 3, 0, 0]]
    where, why = fault(ask(api, EYE, [{"content": []}]))
    assert where == "input -> 0 -> content"
    assert "at least 1" in why


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (
            EMBEDDED.id,
            {"image": "AAAA"},
            "takes text only. Models served here that take image input: eye, jina-clip-v2, jina-embeddings-v4.",
        ),
        (EMBEDDED.id, {"video": "AAAA"}, "takes text only. Models served here that take video input: eye."),
        (EMBEDDED.id, {"content": [{"text": "a"}]}, "Models served here that take groups of parts: eye."),
        (
            CLIP,
            {"audio": "AAAA"},
            "takes text, image, pdf, each on its own. Models served here that take audio input: eye.",
        ),
        (CLIP, [{"content": [{"text": "a"}, {"image": "AAAA"}]}], "that take groups of parts: eye."),
    ],
)
def test_who_does_not_take_media_says_who_does(api: Api, eye: Eye, model: str, given: object, words: str) -> None:
    where, why = fault(ask(api, model, given))
    assert where == "input -> 0"
    assert words in why


def test_models_that_rank_or_chat_are_not_named_to_who_wants_vectors(api: Api) -> None:
    served = {name: CATALOG[name] for name in (EMBEDDED.id, CLIP, "jina-vlm", "jina-reranker-m0")}
    state = replace(api.app.state.parts, served=lambda: served)
    sent = Reference("image", "AAAA", "body -> input -> 0")
    with pytest.raises(InputError, match=f"that take image input: {CLIP}\\.$"):
        check_media(state, EMBEDDED, [sent])


def test_a_data_uri_is_a_text_to_a_model_that_reads_texts_only(api: Api) -> None:
    uri = data_uri(plain(RED))
    assert vectors(api, EMBEDDED.id, uri) == vectors(api, EMBEDDED.id, {"text": uri})
    assert vectors(api, CLIP, uri) == vectors(api, CLIP, {"image": uri})
    assert vectors(api, CLIP, "data: a word") == vectors(api, CLIP, {"text": "data: a word"})


def test_what_is_there_twice_is_fetched_and_decoded_once(api: Api, eye: Eye, site: Website) -> None:
    content = plain(GREEN)
    url = site.say("/twice.png", content)
    image = {"image": url}
    answer = ask(api, EYE, [image, "a", image, {"image": text_of(content)}, image]).json()
    assert [item["embedding"][0] for item in answer["data"]] == [1, 0, 1, 1, 1]
    assert answer["usage"]["image_tokens"] == 20
    assert eye.seen == ["image"]
    assert sum(asked.path == "/twice.png" for asked in site.asked) == 1


def test_late_chunking_divides_texts_only(api: Api, eye: Eye) -> None:
    where, why = fault(ask(api, EYE, ["a text", {"image": text_of(plain(RED))}], late_chunking=True))
    assert where == "late_chunking"
    assert "image input" in why
    assert not eye.seen


def test_a_url_that_cannot_be_read_is_named(api: Api, site: Website) -> None:
    large = site.say("/large.png", b"", Content_Length="9000000")
    for url, words in (
        (site.url + "/missing.png", "answered 404"),
        (large, "larger than 8 MB"),
        ("file:///etc/passwd", "use http or https"),
        ("http://10.1.2.3/x.png", "cannot be reached"),
        ("http://169.254.169.254/latest/meta-data", "cannot be reached"),
        (site.redirect("/away", "http://10.1.2.3/x.png"), "cannot be reached"),
        (site.say("/page.png", b"<html>sign in</html>"), "not an image of a known format"),
    ):
        where, why = fault(ask(api, CLIP, ["a text", {"image": url}]))
        assert where == "input -> 1 -> image"
        assert words in why


def test_files_are_bounded_in_number_and_size(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    image = {"image": text_of(plain(RED))}
    assert len(vectors(api, CLIP, [image] * 20)) == 20
    assert "may hold 20 images and other files, not 21" in fault(ask(api, CLIP, [image] * 21))[1]
    noise = [
        {"image": text_of(saved(np.random.default_rng(seed).integers(0, 256, (100, 100, 3), dtype=np.uint8)))}
        for seed in range(4)
    ]
    settings = api.app.state.parts.settings
    monkeypatch.setattr(settings, "max_media_mb", 0.1)
    where, why = fault(ask(api, CLIP, noise))
    assert where == "input"
    assert "larger than the 0.1 MB that a request may hold" in why
    assert len(vectors(api, CLIP, noise[:3])) == 3
    monkeypatch.setattr(settings, "max_image_mb", 0.02)
    assert "larger than the 0.02 MB allowed" in fault(ask(api, CLIP, noise[:1]))[1]


def test_a_callers_slow_files_hold_up_nobody_elses(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    state, slow, n_fetching = api.app.state.parts, asyncio.Event(), 0

    class Slow:
        async def fetch(self, url: str, *, max_bytes: int) -> bytes:
            nonlocal n_fetching
            n_fetching += 1
            try:
                if "slow" in url:
                    await slow.wait()
            finally:
                n_fetching -= 1
            return plain(RED)

    def urls(name: str, n: int) -> list[Reference]:
        return [Reference("image", f"https://{name}/{number}", "input") for number in range(n)]

    async def read(caller: str, sent: list[Reference]) -> int:
        async with opened(state, sent, caller=caller) as inputs:
            return len(inputs)

    async def work() -> None:
        monkeypatch.setattr(state, "fetcher", Slow())
        many = [asyncio.ensure_future(read("one", urls(f"slow{number}", 9))) for number in range(5)]
        while n_fetching < 16:
            await asyncio.sleep(0)
        assert await read("other", urls("quick", 9)) == 9
        assert n_fetching == 16
        slow.set()
        assert await asyncio.gather(*many) == [9] * 5
        gc.collect()
        assert not {"one", "other"} & set(state.gates)

    api.run(work())


def test_the_files_of_all_requests_are_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    state = api.app.state.parts
    monkeypatch.setattr(state.settings, "max_all_media_mb", 0.001)
    image = {"image": text_of(plain(RED))}
    assert len(vectors(api, CLIP, image)) == 1  # alone it is taken, whatever the bound
    monkeypatch.setattr(state, "n_file_bytes", 1_000)  # what another request holds
    answer = api.run(api.client.post("/v1/embeddings", json={"model": CLIP, "input": image}))
    conforms(answer)
    assert answer.status_code == 503
    assert "Try again" in answer.json()["detail"]
    assert state.n_file_bytes == 1_000


def test_what_a_request_has_left_is_not_decoded(api: Api) -> None:
    async def leave() -> Media:
        reference = Reference("image", text_of(plain(RED)), "body -> input")
        async with opened(api.app.state.parts, [reference]) as [file]:
            assert isinstance(file, Media)
            assert len(list(media.pictures(file))) == 1
        return file

    left = api.run(leave())
    with pytest.raises(InputError, match="Nobody waits"):
        list(media.pictures(left))


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"task": "retrieval"}, "retrieval.query"),
        ({"task": "retrieval", "prompt_name": "query"}, "retrieval.query"),
        ({"task": "retrieval", "prompt_name": "passage"}, "retrieval.passage"),
        ({"task": "code", "prompt_name": "passage"}, "code.passage"),
        ({"task": "text-matching", "prompt_name": "passage"}, "text-matching"),
        ({"task": "code.passage"}, "code.passage"),
        ({}, None),
    ],
)
def test_older_names_of_tasks(asked: dict[str, str], meant: str | None) -> None:
    request = EmbeddingsRequest(model="jina-embeddings-v4", input="x", **asked)
    assert task_of(CATALOG["jina-embeddings-v4"], request) == meant
    assert task_of(CATALOG["jina-embeddings-v3"], request) == asked.get("task")


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({"task": "retrieval", "prompt_name": "document"}, "prompt_name", "'query' or 'passage'"),
        ({"task": "retrieval.query", "prompt_name": "passage"}, "prompt_name", "contradicts the task"),
        ({"task": "classification"}, "task", "'text-matching', 'retrieval.query'"),
    ],
)
def test_tasks_that_cannot_be_meant(
    api: Api, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], where: str, words: str
) -> None:
    v4 = CATALOG["jina-embeddings-v4"]
    monkeypatch.setattr(api.app.state.parts, "served", lambda: {v4.id: v4})
    found, why = fault(ask(api, v4.id, "a text", **fields))
    assert found == where
    assert words in why


def post(api: Api, path: str, **body: object) -> httpx.Response:
    answer = api.run(api.client.post(path, json=body))
    conforms(answer)
    assert api.app.state.parts.n_file_bytes == 0
    return answer


@pytest.mark.parametrize("model", [CLIP, V4])
def test_images_are_classified_by_labels_and_by_what_was_learned(api: Api, model: str) -> None:
    red, blue = ({"image": text_of(plain(colour, 32, 32))} for colour in (RED, BLUE))
    answer = post(api, "/v1/classify", model=model, input=[red, "a text", blue, red], labels=["warm", "cold"])
    assert answer.status_code == 200, answer.text
    scores = [[each["score"] for each in item["predictions"]] for item in answer.json()["data"]]
    assert scores[0] == scores[3]
    assert scores[0] != scores[2]
    given = [{**red, "label": "warm"}, {**blue, "label": "cold"}, {"text": "ice", "label": "cold"}]
    trained = post(api, "/v1/train", model=model, input=given)
    assert trained.status_code == 200, trained.text
    learned = post(api, "/v1/classify", classifier_id=trained.json()["classifier_id"], input=[blue, red]).json()
    assert [item["prediction"] for item in learned["data"]] == ["cold", "warm"]


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        (CLIP, {"pdf": text_of(pdf([b""]))}, "Send its pages as images"),
        (CLIP, {"audio": "AAAA"}, "that take audio input: eye"),
        (EMBEDDED.id, {"image": "AAAA"}, "takes text only. Models served here that take image input"),
        (CLIP, {"image": text_of(b"hello there")}, "not an image of a known format"),
    ],
)
def test_what_cannot_be_classified_is_named(api: Api, model: str, given: dict[str, str], words: str) -> None:
    asked = post(api, "/v1/classify", model=model, input=["a text", given], labels=["a", "b"])
    example = post(api, "/v1/train", model=model, input=[{"text": "a", "label": "x"}, {**given, "label": "y"}])
    for answer in (asked, example):
        where, why = fault(answer)
        assert where.startswith("input -> 1")
        assert words in why
