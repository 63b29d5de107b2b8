"""`POST /v1/chat/completions`: OpenAI's shape, whole and as it is written, on a tiny jina-vlm."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fundament.api.chat import ChatRequest, chat
from fundament.engine.generator import Generator
from tests.checkpoints.clip import picture
from tests.checkpoints.jina_vlm import jina_vlm
from tests.contract.schemas import conforms
from tests.inprocess import Api, running
from tests.served import MODEL

VLM = "jina-vlm"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    root = tmp_path_factory.mktemp("chat")
    named = [f"{VLM}={jina_vlm(root / 'vlm')}", MODEL]
    with running(root, models=named, dtype="float32", chat_memory_gb=0.01) as api:
        yield api


def uri(height: int, width: int) -> str:
    file = io.BytesIO()
    Image.fromarray(picture(height, width)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def body(content: Any = "what the", **fields: Any) -> dict[str, Any]:
    return {"model": VLM, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


async def post(api: Api, **fields: Any) -> httpx.Response:
    answer = await api.client.post(PATH, json=fields)
    if not fields.get("stream") or answer.is_error:
        conforms(answer)
    return answer


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def events(answer: httpx.Response) -> list[Any]:
    """The events of a stream, the last of which says that it is the last."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_that_is_being_written_holds_no_files(api: Api) -> None:
    parts = [{"type": "image_url", "image_url": {"url": uri(64, 64)}}, {"type": "text", "text": "what"}]
    request, state = ChatRequest.model_validate(body(parts)), api.app.state.parts

    async def begin() -> int:
        deltas = chat(state, request)
        await anext(deltas)
        held: int = state.n_file_bytes
        await deltas.aclose()
        return held

    assert api.run(begin()) == 0


def generator(api: Api) -> Generator:
    found = api.app.state.parts.engine._engine.memory.loaded[VLM].batcher
    assert isinstance(found, Generator)
    return found


PICTURED = [{"type": "image_url", "image_url": {"url": uri(60, 80)}}, {"type": "text", "text": "what"}]


@pytest.mark.parametrize("content", ["what the", PICTURED, [{"type": "text", "text": ""}], None])
def test_an_answer_has_openais_shape(api: Api, content: Any) -> None:
    answer = api.run(post(api, **body(content))).json()
    assert answer["model"] == VLM
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 8
    assert usage["prompt_tokens"] > (40 if content is PICTURED else 5)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.3, "seed": 4}, {"stop": "a"}])
def test_a_stream_says_what_the_whole_answer_says(api: Api, fields: dict[str, Any]) -> None:
    asked = body(PICTURED, **fields) | {"max_tokens": 30}
    whole = api.run(post(api, **asked))
    sent = events(api.run(post(api, **asked, stream=True, stream_options={"include_usage": True})))
    assert sent[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [each["choices"][0]["delta"].get("content", "") for each in sent if each["choices"]]
    assert "".join(pieces) == text_of(whole)
    assert sent[-2]["choices"][0]["finish_reason"] == whole.json()["choices"][0]["finish_reason"]
    assert (sent[-1]["choices"], sent[-1]["usage"]) == ([], whole.json()["usage"])
    assert all(each["usage"] is None for each in sent[:-1])
    assert {each["object"] for each in sent} == {"chat.completion.chunk"}
    assert len({each["id"] for each in sent}) == 1
    assert all("usage" not in each for each in events(api.run(post(api, **asked, stream=True))))


def test_conversations_at_once_answer_as_each_alone(api: Api) -> None:
    asked = [body(content, max_tokens=n) for n, content in enumerate(["the", PICTURED, "what " * 9, PICTURED[1:]], 5)]

    async def together() -> list[httpx.Response]:
        return await asyncio.gather(*(post(api, **each) for each in asked))

    assert [text_of(each) for each in api.run(together())] == [text_of(api.run(post(api, **each))) for each in asked]


def test_roles_and_synonyms(api: Api) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": uri(56, 56)}]},
    ]
    asked = {"model": VLM, "messages": messages, "max_completion_tokens": 3, "repetition_penalty": 1.05, "n": 1}
    found = api.run(post(api, **asked))
    assert found.json()["usage"]["completion_tokens"] <= 3
    messages[0]["role"] = "system"
    assert text_of(api.run(post(api, **asked, max_tokens=None))) == text_of(found)


@pytest.mark.parametrize(
    ("fields", "place", "words"),
    [
        ({"model": MODEL}, "model", f"does not chat. Models served here that do: {VLM}"),
        ({"messages": []}, "messages", "list of messages"),
        ({"messages": "hello"}, "messages", "list of messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages -> 0 -> role", "'developer'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages -> 0 -> role", "'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages -> 0 -> content -> 0", "A part"),
        ({"messages": [{"role": "user", "content": [PICTURED[0] | {"image_url": {}}]}]}, "messages -> 0", "A part"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,AA"}]}
                ]
            },
            "messages -> 0 -> content -> 0 -> image_url",
            "",
        ),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"n": 2}, "n", "less than or equal to 1"),
        ({"tools": [{}]}, "tools", "not served"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages -> 0 -> tool_calls",
            "Tools are not served",
        ),
        ({"tool_choice": "required"}, "tool_choice", "not served"),
        ({"functions": [{}]}, "functions", "not served"),
        ({"modalities": ["text", "audio"]}, "modalities", "not served"),
        ({"audio": {"voice": "any"}}, "audio", "not served"),
        ({"top_logprobs": 2}, "top_logprobs", "not served"),
        ({"logprobs": True}, "logprobs", "not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
        ({"presence_penalty": 0.5}, "presence_penalty", "less than or equal to 0"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options -> include_usage", "boolean"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_at_its_place(
    api: Api, fields: dict[str, Any], place: str, words: str, stream: bool
) -> None:
    answer = api.run(post(api, **body() | fields, stream=stream))
    assert answer.status_code == 422, answer.text
    fault = answer.json()["errors"][0]
    assert fault["field"].startswith(f"body -> {place}")
    assert words in fault["message"]


def test_conversations_that_find_no_room_are_refused(api: Api) -> None:
    """10 MB are some 19,000 tokens of this model."""
    for asked in (body(max_tokens=900_000), body("the " * 40_000), body(max_tokens=30_000)):
        answer = api.run(post(api, **asked))
        assert answer.status_code == 400, answer.text
        assert answer.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
    assert api.run(post(api, **body())).status_code == 200


def test_a_model_that_chats_does_nothing_else(api: Api) -> None:
    for path, fields in (
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/v1/classify", {"input": ["x"], "labels": ["a", "b"]}),
    ):
        answer = api.run(api.client.post(path, json={"model": VLM, **fields}))
        conforms(answer)
        assert answer.status_code == 422, (path, answer.text)


def test_a_client_that_leaves_takes_its_conversation_with_it(api: Api) -> None:
    async def leave() -> None:
        left = asyncio.ensure_future(post(api, **body(max_tokens=2000, stop=["never"])))
        while not generator(api)._running:
            await asyncio.sleep(0.001)
        left.cancel()
        await asyncio.wait((left,))
        while generator(api)._running or generator(api)._waiting:
            await asyncio.sleep(0.001)

    api.run(leave())
    assert api.run(post(api, **body())).status_code == 200


def test_a_conversation_past_its_time_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(api.app.state.parts.settings, "request_seconds", 0.01)
        late = api.run(post(api, **body(max_tokens=10_000, stop=["never"])))
    assert (late.status_code, late.json()["code"]) == (504, "SERVICE_TIMEOUT")

    async def ended() -> None:
        while generator(api)._running or generator(api)._waiting:
            await asyncio.sleep(0.001)

    api.run(ended())
    assert api.run(post(api, **body())).status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": values})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant"]) | values},
    optional={"content": values | st.text(max_size=9) | st.lists(parts | values, max_size=2)},
)
FIELDS = ["temperature", "top_p", "stop", "seed", "stream_options", "n", "tools", "logit_bias", "response_format"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.fixed_dictionaries(
        {"model": st.just(VLM), "messages": st.lists(messages, max_size=3) | values, "max_tokens": st.just(2)},
        optional=dict.fromkeys(FIELDS, values),
    )
)
def test_any_conversation_is_answered_or_refused(api: Api, content: dict[str, Any]) -> None:
    response = api.run(api.client.post(PATH, content=orjson.dumps(content)))
    assert response.status_code < 500, response.text
    conforms(response)
