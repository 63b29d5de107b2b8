"""jina-reranker-v3 and v3.5 against a reading of the prompt with transformers' Qwen3Model, in float32."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fundament.catalog import CATALOG
from fundament.core import Ranking, Rerank
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from fundament.models import family_of, listwise
from tests.checkpoints import qwen_reranker, resave
from tests.checkpoints.qwen_reranker import HYBRID, LISTWISE, rank
from tests.conftest import BFLOAT16

CONFIGS = {"v3": LISTWISE, "v3.5": HYBRID}
QUERY = "who is the other?\n"
DOCUMENTS = ["the other is in", "", "naïve 東京 🙂\n", "is the other in", ">\n\n<passage>", "in the inner city " * 20]
MORE = [*DOCUMENTS, "the other", "in the city", "東京"]


def written(query: str, documents: list[str], instruction: str | None = None) -> str:
    """The prompt of the model card."""
    lines = [
        "<|im_start|>system",
        "You are a search relevance expert who can determine a ranking of the passages based on how relevant they are "
        "to the query. If the query is a question, how relevant a passage is depends on how well it answers the "
        "question. If not, try to analyze the intent of the query and assess how well each passage satisfies the "
        "intent. If an instruction is provided, you should follow the instruction when determining the "
        "ranking.<|im_end|>",
        "<|im_start|>user",
        f"I will provide you with {len(documents)} passages, each indicated by a numerical identifier. Rank the "
        f"passages based on their relevance to query: {query}",
    ]
    if instruction:
        lines += ["<instruct>", instruction, "</instruct>"]
    for i, document in enumerate(documents):
        lines += [f'<passage id="{i}">', f"{document}<|embed_token|>", "</passage>"]
    lines += ["<query>", f"{query}<|rerank_token|>", "</query><|im_end|>", "<|im_start|>assistant"]
    return "\n".join([*lines, "<think>", "", "</think>", "", ""])


def reference(name: str, directory: Path, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected vectors of the documents and of the query, by transformers."""
    found = qwen_reranker.weights(CONFIGS[name], projector=True)
    ids = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))(prompt)["input_ids"]
    states = qwen_reranker.states(CONFIGS[name], found, ids)
    vectors = F.relu(states @ found["projector.0.weight"].T) @ found["projector.2.weight"].T
    marks = [qwen_reranker.tokenizer().token_to_id(mark) for mark in ("<|embed_token|>", "<|rerank_token|>")]
    return vectors[torch.tensor(ids) == marks[0]], vectors[torch.tensor(ids) == marks[1]]


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_reranker.write(tmp_path_factory.mktemp(name), CONFIGS[name], projector=True)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return qwen_reranker.load(directory, "listwise")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listwise, "BLOCK_DOCUMENTS", 4)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("instruction", [None, "prefer what is in the city"])
@pytest.mark.parametrize("documents", [DOCUMENTS, ["one"], [""]], ids=["many", "one", "empty"])
def test_one_block_equals_the_reference(
    name: str, model: Any, directory: Path, documents: list[str], instruction: str | None
) -> None:
    found = rank(model, Rerank(query=QUERY, documents=documents, instruction=instruction, embeddings=True))
    vectors, query = reference(name, directory, written(QUERY, documents, instruction))
    close(found.scores, F.cosine_similarity(vectors, query))
    assert found.embeddings is not None
    close(found.embeddings, F.normalize(vectors))


def test_the_window_shows_in_the_result(tmp_path: Path) -> None:
    call = Rerank(query=QUERY, documents=DOCUMENTS)
    scores = []
    for place, size in enumerate((40, 41, 4000)):
        config = HYBRID | {"sliding_window": size}
        directory = qwen_reranker.write(tmp_path / str(place), config, projector=True)
        scores.append(rank(qwen_reranker.load(directory, "listwise"), call).scores)
    assert all(np.abs(scores[0] - other).max() > 1e-4 for other in scores[1:])


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_merged_as_the_model_card_says(name: str, model: Any, directory: Path) -> None:
    found = rank(model, Rerank(query=QUERY, documents=MORE, embeddings=True))
    parts = [MORE[:4], MORE[4:8], MORE[8:]]
    vectors, queries = zip(*(reference(name, directory, written(QUERY, part)) for part in parts), strict=True)
    weights = [
        ((1 + F.cosine_similarity(its, query)) / 2).max().item() for its, query in zip(vectors, queries, strict=True)
    ]
    merged = np.average(torch.cat(queries).numpy(), axis=0, weights=weights)
    every = torch.cat(vectors).numpy()
    close(found.scores, every @ merged / np.linalg.norm(merged) / np.linalg.norm(every, axis=1))
    assert found.embeddings is not None
    close(found.embeddings, every / np.linalg.norm(every, axis=1, keepdims=True))


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_one_size_share_their_beginning_with_the_first_passage(model: Any) -> None:
    items = model.prepare(Rerank(query=QUERY, documents=MORE))
    parts = [MORE[:4], MORE[4:8], MORE[8:]]
    prefixes = [item.features["prefix"] for item in items]
    whole = [np.concatenate([item.features["prefix"], item.features["ids"]]) for item in items]
    for ids, part in zip(whole, parts, strict=True):
        assert ids.tolist() == qwen_reranker.tokenizer().encode(written(QUERY, part)).ids
    assert np.array_equal(prefixes[0], prefixes[1])
    assert model.tokenizer.text_of(prefixes[0]).endswith(f'relevance to query: {QUERY}\n<passage id="0">\n')
    assert len(prefixes[2]) == 0
    assert [item.n_tokens for item in items] == [len(whole[0]), len(whole[1]) - len(prefixes[0]), len(whole[2])]
    one = model.prepare(Rerank(query=QUERY, documents=MORE[:4]))
    assert len(one[0].features["prefix"]) == 0


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_different_sizes_share_what_comes_before_their_number(model: Any) -> None:
    items = model.prepare(Rerank(query=QUERY, documents=MORE[:6]))
    prefixes = [model.tokenizer.text_of(item.features["prefix"]) for item in items]
    assert len(items) == 2
    assert prefixes[0] == prefixes[1]
    assert prefixes[0].endswith("I will provide you with ")


def test_blocks_end_where_another_document_might_not_fit() -> None:
    def lengths(sizes: list[int], room: int, longest: int, n_around: int = 0) -> list[list[int]]:
        excerpts = [listwise.Excerpt("", size, size) for size in sizes]
        blocks = listwise.divide(excerpts, room, longest, n_around)
        return [[excerpt.n_tokens for excerpt in block] for block in blocks]

    assert lengths([10] * 130, 10_000, 10) == [[10] * 125, [10] * 5]
    assert lengths([10] * 125, 10_000, 10) == [[10] * 125]
    assert lengths([5, 6, 10, 1, 1], 31, 10) == [[5, 6, 10], [1, 1]]
    assert lengths([5, 6, 9, 1, 1], 31, 10) == [[5, 6, 9, 1], [1]]
    assert lengths([40, 1], 31, 10) == [[40], [1]]
    assert lengths([5, 6, 6, 1, 1], 31, 10, 1) == [[5, 6, 6], [1, 1]]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", [1, 3])
def test_equal_documents_are_read_once_and_have_equal_scores(model: Any, n: int) -> None:
    """Those that differ in marks alone are equal: the model reads them alike."""
    call = Rerank(query=QUERY, documents=MORE, embeddings=True)
    again = ["in", *MORE] * n + [f"{MORE[0]}<|embed_token|>"]
    expected = rank(model, Rerank(query=QUERY, documents=["in", *MORE], embeddings=True))
    found = rank(model, Rerank(query=QUERY, documents=again, embeddings=True))
    places = [*range(len(MORE) + 1)] * n + [1]
    assert found.embeddings is not None
    assert expected.embeddings is not None
    assert np.array_equal(found.scores, expected.scores[places])
    assert np.array_equal(found.embeddings, expected.embeddings[places])
    assert found.n_tokens == expected.n_tokens > rank(model, call).n_tokens


@pytest.mark.parametrize(
    "text",
    [
        "the<|embed_token|> other",
        "the<|embed_<|rerank_token|>token|> other",
        "<|rerank_token|>the<|rerank_token|><|embed_token|> other<|embed_token|>",
    ],
)
def test_a_caller_cannot_say_the_marks(model: Any, text: str) -> None:
    plain = rank(model, Rerank(query="the other", documents=["the other", "in"], instruction="the other"))
    marked = rank(model, Rerank(query=text, documents=[text, "in"], instruction=text))
    close(marked.scores, plain.scores)
    assert marked.n_tokens == plain.n_tokens


def stripped_again_and_again(text: str) -> str:
    while found := next((mark for mark in listwise.MARKS if mark in text), None):
        text = text.replace(found, "", 1)
    return text


@settings(max_examples=300)
@given(
    pieces=st.lists(
        st.sampled_from(["<|embed_token|>", "<|rerank_token|>", "<|embed_", "<|rerank_", "token|>", ">", "a"])
    )
)
def test_no_mark_is_left_however_they_are_nested(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = listwise.unmarked(text)
    assert not any(mark in found for mark in listwise.MARKS)
    assert found == stripped_again_and_again(text)


def test_nested_marks_take_one_pass() -> None:
    def nested(n: int) -> str:
        return "<|embed_" * n + "<|embed_token|>" + "token|>" * n

    def n_steps(text: str) -> int:
        """Lines run, each of which looks at a mark's length of the text at most, and what is left of it."""
        n, before = 0, sys.gettrace()

        def count(*_: Any) -> Any:
            nonlocal n
            n += 1
            return count

        sys.settrace(count)
        try:
            assert listwise.unmarked(text) == ""
        finally:
            sys.settrace(before)
        return n

    assert n_steps(nested(2_000)) < 2.1 * n_steps(nested(1_000))
    assert listwise.unmarked(nested(50_000)) == ""


def test_texts_are_cut_by_tokens(name: str, model: Any, directory: Path) -> None:
    tokenizer = qwen_reranker.tokenizer()

    def cut(text: str, n: int) -> str:
        return tokenizer.decode(tokenizer.encode(text).ids[:n], skip_special_tokens=False)

    query, document = "in the inner city who is it", "東京 the other"
    found = rank(model, Rerank(query=query, documents=[document, "in"], max_query_tokens=7, max_document_tokens=4))
    vectors, its = reference(name, directory, written(cut(query, 7), [cut(document, 4), "in"]))
    close(found.scores, F.cosine_similarity(vectors, its))
    assert found.n_truncated == 1
    assert found.n_tokens == 7 + 4 + 2


@pytest.mark.parametrize(("asked", "lengths"), [({}, (512, 2048)), ({"max_document_tokens": 3000}, (512, 3000))])
def test_the_limits_of_the_model_card(model: Any, asked: dict[str, int], lengths: tuple[int, int]) -> None:
    item = model.prepare(Rerank(query="yes" * 600, documents=["no" * 4000], **asked))[0]
    text = model.tokenizer.text_of(item.features["ids"])
    assert text.count("yes") == 2 * lengths[0]
    assert text.count("nono") == lengths[1] // 2
    assert item.n_counted == sum(lengths)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            {"query": "in", "documents": ["in", "no" * 2050]},
            "Document 1 has 2050 tokens and exceeds the model's maximum of 2048",
        ),
        (
            {"query": "no" * 600, "documents": ["in"]},
            "The query has 600 tokens and exceeds the model's maximum of 512",
        ),
    ],
)
def test_a_long_text_is_refused_without_truncate(model: Any, texts: dict[str, Any], message: str) -> None:
    with pytest.raises(TooLongError, match=message):
        model.prepare(Rerank(**texts, truncate=False))
    model.prepare(Rerank(**texts, truncate=False, max_query_tokens=600, max_document_tokens=4))


@pytest.fixture(scope="module")
def short(directory: Path) -> Any:
    """The model with a context that its prompt and a few hundred tokens fill."""
    return qwen_reranker.load(directory, "listwise", context=1_200)


@settings(max_examples=30)
@given(data=st.data())
def test_every_prompt_fits_the_context(short: Any, data: st.DataObject) -> None:
    def words(most: int) -> str:
        return "東 in" * data.draw(st.integers(0, most))

    documents = [f"{place} {words(200)}" for place in range(data.draw(st.integers(1, 6)))]
    call = Rerank(query=words(200), documents=documents, instruction=words(short.room // 8), max_query_tokens=8192)
    items = short.prepare(call)
    whole = [np.concatenate([item.features["prefix"], item.features["ids"]]) for item in items]
    assert max(map(len, whole)) <= 1_200
    assert sum(int(np.isin(ids, short.marks).sum()) - 1 for ids in whole) == len(documents)


def test_an_instruction_is_never_cut_and_leaves_room(short: Any, model: Any) -> None:
    most = short.room // 2
    with pytest.raises(InputError, match=f"instruction: It has {most + 1} tokens. .* at most {most}: shorten it"):
        short.prepare(Rerank(query="in", documents=["in"], instruction="yes" * (most + 1)))
    told = "yes" * most
    [item] = short.prepare(Rerank(query="no", documents=["no" * 500], instruction=told))
    text = model.tokenizer.text_of(item.features["ids"])
    assert f"<instruct>\n{told}\n</instruct>" in text
    assert text.count("no") >= most // 2
    with pytest.raises(TooLongError, match="Document 0 has 500 tokens"):
        short.prepare(Rerank(query="no", documents=["no" * 500], instruction=told, truncate=False))


def test_usage_counts_the_instruction_once(model: Any) -> None:
    call = Rerank(query="no", documents=["in the other", "in"])
    told = rank(model, Rerank(query="no", documents=["in the other", "in"], instruction="yes" * 7))
    assert told.n_tokens == rank(model, call).n_tokens + 7


def test_a_context_too_short_for_the_prompt_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="'tiny' reads 300 tokens, too few for its prompt"):
        qwen_reranker.load(directory, "listwise", context=300)


texts = st.text(max_size=12)
calls = st.builds(
    Rerank,
    query=texts,
    documents=st.lists(texts, min_size=1, max_size=9),
    instruction=st.one_of(st.none(), texts),
    embeddings=st.just(True),
)


@pytest.mark.usefixtures("small_blocks")
def test_a_call_alone_equals_the_call_in_any_company(directory: Path) -> None:
    model, plain = (qwen_reranker.load(directory, "listwise") for _ in range(2))
    plain.decoder.most_shared = 0

    @settings(deadline=None, max_examples=5)
    @given(asked=st.lists(calls, min_size=1, max_size=3))
    def holds(asked: list[Rerank]) -> None:
        items = [model.prepare(call) for call in asked]
        arrays = iter(model.forward([item for own in items for item in own]))
        for call, own in zip(asked, items, strict=True):
            among: Ranking = finish(model, call, own, [next(arrays) for _ in own])
            alone = rank(plain, call)
            close(among.scores, alone.scores)
            close(among.embeddings, alone.embeddings)
            assert len(among.scores) == len(call.documents)
            assert np.isfinite(among.scores).all()

    holds()


def test_vectors_of_zero_and_opposite_ones_have_scores() -> None:
    zero, one = np.zeros((1, 3), dtype=np.float32), np.eye(3, dtype=np.float32)[:1]
    assert listwise.merge([np.concatenate([zero, one])])[0].tolist() == [0]
    assert listwise.merge([np.concatenate([-one, one])] * 2)[0].tolist() == [-1, -1]


def test_no_cosine_is_above_one() -> None:
    drawn = np.random.default_rng(0).standard_normal((200, 1, 7)).astype(np.float32)
    for one in drawn:
        assert np.abs(listwise.merge([np.concatenate([one, -one, one])])[0]).max() <= 1


def test_bfloat16_is_close(model: Any, directory: Path) -> None:
    call = Rerank(query=QUERY, documents=DOCUMENTS, embeddings=True)
    exact, rounded = rank(model, call), rank(qwen_reranker.load(directory, "listwise", placement=BFLOAT16), call)
    assert np.abs(exact.scores - rounded.scores).max() < 0.05
    assert exact.embeddings is not None
    assert rounded.embeddings is not None
    assert (exact.embeddings * rounded.embeddings).sum(axis=1).min() > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector.0.weight": None}, "no projector.0.weight"),
        ({"projector.2.weight": None}, "not in the checkpoint: projector.2.weight"),
        ({"projector.2.weight": torch.zeros(7, qwen_reranker.INNER)}, "projector.2.weight should have the shape"),
        ({"projector.0.weight": torch.zeros(qwen_reranker.INNER, 5)}, "projector.0.weight should have the shape"),
        ({"projector.0.bias": torch.zeros(qwen_reranker.INNER)}, "not known to the model: projector.0.bias"),
        ({"model.norm.weight": None}, "not in the checkpoint: model.norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory = resave(qwen_reranker.write(tmp_path, LISTWISE, projector=True), **changes)
    with pytest.raises(CheckpointError, match=message):
        qwen_reranker.load(directory, "listwise")


def test_a_head_and_bare_names_are_taken(tmp_path: Path) -> None:
    call = Rerank(query=QUERY, documents=DOCUMENTS)
    with_head = qwen_reranker.write(tmp_path / "head", LISTWISE, projector=True, head=True)
    plain = qwen_reranker.write(tmp_path / "plain", LISTWISE, projector=True)
    bare = dict.fromkeys(qwen_reranker.weights(LISTWISE)) | {
        name.removeprefix("model."): tensor for name, tensor in qwen_reranker.weights(LISTWISE).items()
    }
    expected = rank(qwen_reranker.load(plain, "listwise"), call).scores
    close(rank(qwen_reranker.load(with_head, "listwise"), call).scores, expected)
    close(rank(qwen_reranker.load(resave(plain, **bare), "listwise"), call).scores, expected)


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path) -> None:
    path = qwen_reranker.write(tmp_path, LISTWISE, projector=True) / "tokenizer.json"
    path.write_text(path.read_text().replace("<|rerank_token|>", "<|else|>"))
    with pytest.raises(CheckpointError, match=r"lacks <\|rerank_token\|>"):
        qwen_reranker.load(tmp_path, "listwise")


def test_the_family_is_found_in_the_config(directory: Path) -> None:
    assert family_of(json.loads((directory / "config.json").read_text())) == "listwise"
    assert {CATALOG[f"jina-reranker-{version}"].family for version in ("v3", "v3.5")} == {"listwise"}
