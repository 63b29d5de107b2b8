"""Prefixes, the context and what is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundament.backbone.tokenizing import TextTokenizer
from tests.checkpoints import llama


@pytest.fixture(scope="module", params=[True, False], ids=["with an end token", "without"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    llama.tokenizer(ends=request.param).save(str(directory / "tokenizer.json"))
    return TextTokenizer(directory, 20)


@given(text=st.text(max_size=30), prefix=st.sampled_from(["", "Query: ", "in"]))
def test_a_prefix_is_read_and_not_counted(tokenizer: TextTokenizer, text: str, prefix: str) -> None:
    (found,), (joined,) = tokenizer.encode([text], prefix), tokenizer.encode([prefix + text])
    told = tokenizer._tokenizer.encode(prefix + text)
    before = sum(
        stop <= len(prefix) and not special
        for (_, stop), special in zip(told.offsets, told.special_tokens_mask, strict=True)
    )
    assert found.ids.tolist() == joined.ids.tolist()
    assert (found.n_whole, found.truncated) == (joined.n_whole, joined.truncated)
    assert len(found.ids) <= tokenizer.context
    if not found.truncated:
        assert found.n_own == joined.n_whole - before
    assert 0 <= found.n_own <= joined.n_whole - before


def test_the_context_limits_prefix_and_text_together(tokenizer: TextTokenizer) -> None:
    (found,) = tokenizer.encode(["x" * 18], "abcdefg")
    n_special = found.n_whole - 25
    assert found.truncated
    assert len(found.ids) == 20
    assert found.n_own == 20 - 7
    assert found.ids[-n_special:].tolist() == tokenizer.encode([""])[0].ids.tolist() or n_special == 0
