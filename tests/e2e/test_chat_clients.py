"""OpenAI's official client, unchanged, in a conversation with a started server; what it pays; the server's end."""

import base64
import io
import signal
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from tests.accounts.keys import make_key, read_key
from tests.checkpoints.clip import picture
from tests.checkpoints.jina_vlm import jina_vlm
from tests.served import Served, serving, wait_until

VLM = "jina-vlm"
FUNDS = 1_000


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("chat")
    model = f"{VLM}={jina_vlm(root / 'vlm')}"
    with serving(root, models=model, auth=True, dtype="float32", threads=1, chat_memory_gb=0.01) as server:
        yield server


def client_of(server: Served, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def asked(text: str = "what") -> list[openai.types.chat.ChatCompletionMessageParam]:
    file = io.BytesIO()
    Image.fromarray(picture(60, 80)).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image: openai.types.chat.ChatCompletionContentPartImageParam = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_answers_whole_and_as_they_are_written_are_paid_by_their_tokens(guarded: Served) -> None:
    key = make_key(guarded.log_file.parent, balance=FUNDS)
    with client_of(guarded, key) as client:
        whole = client.chat.completions.create(model=VLM, messages=asked(), max_tokens=20)
        stream = client.chat.completions.create(
            model=VLM, messages=asked(), max_tokens=20, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert whole.usage is not None
        assert chunks[-1].usage == whole.usage
        spent = 2 * whole.usage.total_tokens
        wait_until(lambda: read_key(key, guarded.log_file.parent).balance == FUNDS - spent, "what is paid")
        with pytest.raises(openai.PermissionDeniedError, match="Insufficient account balance"):
            client.chat.completions.create(model=VLM, messages=asked(), max_tokens=2_000)
        assert read_key(key, guarded.log_file.parent).balance == FUNDS - spent


def test_a_client_that_leaves_pays_what_was_written(guarded: Served) -> None:
    key = make_key(guarded.log_file.parent, balance=10_000)
    with client_of(guarded, key) as client:
        stream = client.chat.completions.create(model=VLM, messages=asked(), max_tokens=5_000, stream=True)
        next(iter(stream))
        stream.close()

    def given_back() -> bool:
        balance = read_key(key, guarded.log_file.parent).balance
        return balance is not None and 10_000 - 5_000 < balance < 10_000

    wait_until(given_back, "what was not written")


def test_running_answers_are_finished_at_the_end(guarded: Served) -> None:
    """The last of this file: it ends the server."""
    key = make_key(guarded.log_file.parent)
    with client_of(guarded, key) as client:
        stream = client.chat.completions.create(model=VLM, messages=asked(), max_tokens=300, stream=True)
        chunks = iter(stream)
        next(chunks)
        guarded.signal(signal.SIGTERM)
        last = [chunk.choices[0].finish_reason for chunk in chunks][-1]
        assert last in ("length", "stop")
    assert guarded.exit_code() == 0
