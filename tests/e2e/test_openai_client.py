"""The official `openai` client, unchanged, against a started server."""

from collections.abc import Iterator

import numpy as np
import openai
import pytest

from tests.served import MODEL, Served

TEXTS = ["the cat sits", "a dog runs", ""]


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_embeddings_are_equal_in_its_default_encoding_and_as_floats(client: openai.OpenAI) -> None:
    default = client.embeddings.create(model=MODEL, input=TEXTS)
    floats = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    encoded = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="base64")
    assert isinstance(encoded.data[0].embedding, str)
    assert [item.index for item in default.data] == [0, 1, 2]
    for one, other in zip(default.data, floats.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)
    assert default.usage.prompt_tokens == default.usage.total_tokens == floats.usage.total_tokens > 0
    assert (default.model, default.object, default.data[0].object) == (MODEL, "list", "embedding")


def test_a_single_string_and_the_models_own_dimension(client: openai.OpenAI) -> None:
    [item] = client.embeddings.create(model=MODEL, input="one", dimensions=384, user="somebody").data
    assert len(item.embedding) == 384


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert MODEL in [model.id for model in listed]
    found = client.models.retrieve(MODEL)
    assert (found.id, found.object, found.owned_by) == (MODEL, "model", "sentence-transformers")
    assert found.created == 1_630_281_600  # 2021-08-30


def test_an_error_says_our_sentence(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="Model 'text-embedding-3-small' not found") as caught:
        client.embeddings.create(model="text-embedding-3-small", input="x")
    assert MODEL in str(caught.value)
    assert caught.value.code == "INPUT_MODEL_NOT_FOUND"
    assert caught.value.request_id
    with pytest.raises(openai.UnprocessableEntityError, match="Token ids are not accepted") as refused:
        client.embeddings.create(model=MODEL, input=[[1, 2], [3]])
    assert refused.value.param == "input -> 0"
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.models.retrieve("text-embedding-3-small")
