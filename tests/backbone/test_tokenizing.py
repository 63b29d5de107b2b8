"""Prefixes, the context and what is counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundament.backbone import tokenizing
from fundament.backbone.tokenizing import TextTokenizer
from fundament.engine.weights import embedded
from tests.checkpoints import byte_bpe, llama, unigram, word_piece


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


THERE = embedded()
assert THERE is not None
LONG = {
    "word pieces": TextTokenizer(word_piece(), 12),
    "bytes": TextTokenizer(byte_bpe(), 12),
    "unigrams": TextTokenizer(unigram(), 12),
    "the embedded model's": TextTokenizer(THERE.directory, 12),
}
WORDS = [
    "the",
    "searching",
    "Where's",
    "in",
    "东京",
    "東京",
    "e\u0301",
    "Σ",
    "...",
    "!?",
    "12345",
    "x" * 40,
    "<s>",
    "[SEP]",
    "🙂",
]
GAPS = [" ", "  ", "\n", "!\n", " \n ", "\t", "", "\u3000", " " * 50, "。", "，", "、\n", "！？"]


@pytest.mark.parametrize("kind", list(LONG))
@given(
    parts=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)), max_size=60),
    prefix=st.sampled_from(["", "Query: "]),
)
def test_the_beginning_of_a_long_text_is_that_of_the_whole(
    kind: str, parts: list[tuple[str, str]], prefix: str
) -> None:
    text = "".join(word + gap for word, gap in parts)
    tokenizer = LONG[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "_CHARACTERS_PER_TOKEN", 2)
        (found,) = tokenizer.encode([text], prefix)
        patch.setattr(tokenizer, "_word_end", None)
        (whole,) = tokenizer.encode([text], prefix)
    assert found.ids.tolist() == whole.ids.tolist()
    assert (found.truncated, found.n_own) == (whole.truncated, whole.n_own)
    assert found.n_whole == whole.n_whole if found.is_whole else tokenizer.context < found.n_whole <= whole.n_whole


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((kind, "the search ") for kind in LONG),
        *((kind, "今天天气很好，我们去公园散步。") for kind in LONG if kind != "unigrams"),
    ],
)
def test_of_a_very_long_text_a_beginning_is_looked_at(kind: str, text: str) -> None:
    tokenizer = LONG[kind]
    (found,) = tokenizer.encode([text * 100_000])
    assert not found.is_whole
    assert tokenizer.context < found.n_whole < 2_000
    (found,) = tokenizer.encode(["thesearch" * 1_000])  # one word, which nothing divides
    assert found.is_whole
