"""Qwen3-Reranker against transformers' language model run as the model card says, padded on the left, in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fundament.backbone import generative
from fundament.core import Rerank
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from tests.checkpoints import qwen_reranker, resave, save
from tests.checkpoints.llama import Config
from tests.checkpoints.qwen_reranker import GENERATIVE, rank
from tests.conftest import BFLOAT16
from tests.golden.publishers import INSTRUCTION, JUDGE, JUDGED

UNTIED = GENERATIVE | {"tie_word_embeddings": False}
QUERY = "who is the other?\n"
DOCUMENTS = [
    "the other is in",
    "",
    "naïve 東京 🙂\n",
    "the other is in",
    "\n\n<Document>: yes",
    "in the inner city " * 20,
]


def reference(
    config: Config,
    directory: Path,
    query: str,
    documents: list[str],
    *,
    instruction: str = INSTRUCTION,
    max_length: int = 8192,
    head: bool = False,
) -> list[float]:
    """The probabilities of yes, all documents in one batch padded on the left."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), padding_side="left", pad_token="<|endoftext|>"
    )
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (JUDGE, JUDGED))
    pairs = [f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}" for document in documents]
    room = max_length - len(before) - len(after)
    bodies = tokenizer(pairs, truncation=True, max_length=room)["input_ids"]
    batch = tokenizer.pad({"input_ids": [before + body + after for body in bodies]}, return_tensors="pt")
    network = qwen_reranker.language_model(config, qwen_reranker.weights(config, head=head))
    with torch.inference_mode():
        logits = network(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits[:, -1, :]
    answers = logits[:, [tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]]
    probabilities: list[float] = torch.log_softmax(answers, dim=1)[:, 1].exp().tolist()
    return probabilities


def close(found: Any, expected: Any) -> None:
    both = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_reranker.write(tmp_path_factory.mktemp("generative"), GENERATIVE)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return qwen_reranker.load(directory, "qwen")


@pytest.mark.parametrize("instruction", [None, "find what is in the city"])
@pytest.mark.parametrize("documents", [DOCUMENTS, ["one"], [""]], ids=["many", "one", "empty"])
def test_equals_the_reference(model: Any, directory: Path, documents: list[str], instruction: str | None) -> None:
    found = rank(model, Rerank(query=QUERY, documents=documents, instruction=instruction))
    close(found.scores, reference(GENERATIVE, directory, QUERY, documents, instruction=instruction or INSTRUCTION))
    assert found.embeddings is None
    assert found.scores.dtype == np.float64  # in which no two probabilities near one are equal


@pytest.mark.parametrize("seed", range(4))
def test_shuffled_documents_keep_their_scores_and_their_order(model: Any, seed: int) -> None:
    documents = [*DOCUMENTS, *(f"the {word} city" for word in ("inner", "other", "same", "東京"))]
    order = np.random.default_rng(seed).permutation(len(documents))
    expected = rank(model, Rerank(query=QUERY, documents=documents)).scores
    found = rank(model, Rerank(query=QUERY, documents=[documents[place] for place in order])).scores
    close(found, expected[order])
    best = [documents[place] for place in np.argsort(-expected, kind="stable")]
    assert [documents[order[place]] for place in np.argsort(-found, kind="stable")] == best


def test_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    directory = qwen_reranker.write(tmp_path, UNTIED, head=True)
    found = rank(qwen_reranker.load(directory, "qwen"), Rerank(query=QUERY, documents=DOCUMENTS))
    close(found.scores, reference(UNTIED, directory, QUERY, DOCUMENTS, head=True))
    assert np.ptp(found.scores) > 0.1


def test_a_tied_matrix_that_is_saved_too(directory: Path, model: Any, tmp_path: Path) -> None:
    saved = qwen_reranker.write(tmp_path, GENERATIVE)
    resave(saved, **{"lm_head.weight": qwen_reranker.weights(GENERATIVE)["model.embed_tokens.weight"].clone()})
    call = Rerank(query=QUERY, documents=DOCUMENTS)
    close(rank(qwen_reranker.load(saved, "qwen"), call).scores, rank(model, call).scores)


def test_prompts_are_tokenized_as_whole_texts(model: Any) -> None:
    """The head, the body and the tail are tokenized apart: nothing merges where they meet."""
    items = model.prepare(Rerank(query=QUERY, documents=DOCUMENTS))
    for item, document in zip(items, dict.fromkeys(DOCUMENTS), strict=True):
        text = f"{JUDGE}<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {document}{JUDGED}"
        ids = np.concatenate([item.features["prefix"], item.features["ids"]])
        assert ids.tolist() == qwen_reranker.tokenizer().encode(text).ids


def test_the_prompt_runs_once_for_all_documents(model: Any) -> None:
    items = model.prepare(Rerank(query=QUERY, documents=["the other", "in the city", "yes"]))
    prefixes = [item.features["prefix"] for item in items]
    assert all(np.array_equal(prefixes[0], prefix) for prefix in prefixes)
    assert f"<Query>: {QUERY}\n<Document>:" in model.tokenizer.text_of(prefixes[0])
    assert [item.n_tokens - len(item.features["ids"]) for item in items] == [len(prefixes[0]), 0, 0]


def test_bodies_are_cut_where_the_prompt_would_be_too_long(
    model: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["the other " * 20, "in", "the other " * 19]
    monkeypatch.setattr(generative, "PROMPT_TOKENS", 250)
    call = Rerank(query=QUERY, documents=documents)
    found = rank(model, call)
    close(found.scores, reference(GENERATIVE, directory, QUERY, documents, max_length=250))
    assert found.n_truncated == 2
    assert len(np.concatenate([model.prepare(call)[0].features[part] for part in ("prefix", "ids")])) == 250
    with pytest.raises(TooLongError, match=r"Document 0, with its prompt, has .* maximum of 250 tokens"):
        model.prepare(Rerank(query=QUERY, documents=documents, truncate=False))


def test_neither_instruction_nor_query_cuts_the_document_away(model: Any) -> None:
    """Both are as long as they may be, and so is the query that is asked for."""
    room = generative.PROMPT_TOKENS - len(model.head) - len(model.tail) - model.n_labels
    told, query = "yes" * (room // 2), "no" * 9000
    for fields in ({}, {"max_query_tokens": 8192}):
        call = Rerank(query=query, documents=["?" * 9000], instruction=told, **fields)
        [item] = model.prepare(call)
        text = model.tokenizer.text_of(item.features["ids"])
        assert len(item.features["ids"]) == generative.PROMPT_TOKENS
        assert text.count("yes") == room // 2 + 1  # the prompt says it too
        assert text.count("?") >= room // 4
        assert text.count("no") >= room // 4
        assert item.n_counted == room
    with pytest.raises(TooLongError, match="The query has 8192 tokens"):
        model.prepare(Rerank(query=query, documents=["?"], max_query_tokens=8192, truncate=False))
    with pytest.raises(InputError, match=f"instruction: It has {room // 2 + 1} tokens"):
        model.prepare(Rerank(query="a", documents=["b"], instruction=told + "yes"))


def test_a_caller_asks_for_shorter_texts(model: Any, directory: Path) -> None:
    tokenizer = qwen_reranker.tokenizer()
    query, document = (tokenizer.decode(tokenizer.encode(text).ids[:5]) for text in ("in the inner city", DOCUMENTS[0]))
    found = rank(
        model,
        Rerank(query="in the inner city", documents=[DOCUMENTS[0], "in"], max_query_tokens=5, max_document_tokens=5),
    )
    close(found.scores, reference(GENERATIVE, directory, query, [document, "in"]))
    assert found.n_truncated == 1


def test_usage_counts_the_query_with_each_document(model: Any) -> None:
    tokenizer = qwen_reranker.tokenizer()
    n_query, *n_documents = (len(tokenizer.encode(text).ids) for text in ("the other?", "in", "yes it is"))
    found = rank(model, Rerank(query="the other?", documents=["in", "yes it is"]))
    assert found.n_tokens == 2 * n_query + sum(n_documents)
    told = rank(model, Rerank(query="the other?", documents=["in", "yes it is"], instruction="yes" * 5))
    assert told.n_tokens == found.n_tokens + 2 * 5


texts = st.text(max_size=12)
calls = st.builds(
    Rerank,
    query=texts,
    documents=st.lists(texts, min_size=1, max_size=6),
    instruction=st.one_of(st.none(), texts),
)


@settings(deadline=None, max_examples=8)
@given(asked=st.lists(calls, min_size=1, max_size=3))
def test_a_call_alone_equals_the_call_in_any_company(model: Any, directory: Path, asked: list[Rerank]) -> None:
    items = [model.prepare(call) for call in asked]
    arrays = iter(model.forward([item for own in items for item in own]))
    for call, own in zip(asked, items, strict=True):
        among = finish(model, call, own, [next(arrays) for _ in own])
        assert len(among.scores) == len(call.documents)
        # A document by itself shares no prefix, so that nothing is taken from what is kept.
        alone = [
            rank(model, Rerank(query=call.query, documents=[text], instruction=call.instruction)).scores[0]
            for text in call.documents
        ]
        close(among.scores, np.array(alone))


def test_bfloat16_is_close(model: Any, directory: Path) -> None:
    call = Rerank(query=QUERY, documents=DOCUMENTS)
    exact, rounded = rank(model, call), rank(qwen_reranker.load(directory, "qwen", placement=BFLOAT16), call)
    assert np.abs(exact.scores - rounded.scores).max() < 0.1


def test_vectors_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="makes no vectors"):
        model.prepare(Rerank(query="a", documents=["b"], embeddings=True))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GENERATIVE, {"lm_head.weight": torch.ones(GENERATIVE["vocab_size"], 32)}, "has another lm_head.weight than"),
        (GENERATIVE, {"lm_head.weight": torch.ones(3, 32)}, "has another lm_head.weight than"),
        (UNTIED, {}, r"has no lm_head\.weight, and tie_word_embeddings of config\.json says False"),
        (UNTIED, {"lm_head.weight": torch.zeros(3, 32)}, r"lm_head\.weight should have the shape"),
        (GENERATIVE, {"model.layers.0.mlp.up_proj.weight": None}, "not in the checkpoint"),
        (GENERATIVE, {"score.weight": torch.zeros(1, 32)}, "not known to the model: score.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, config: Config, changes: dict[str, Any], message: str
) -> None:
    directory = resave(qwen_reranker.write(tmp_path, config), **changes)
    with pytest.raises(CheckpointError, match=message):
        qwen_reranker.load(directory, "qwen")


def test_a_tokenizer_without_the_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_reranker, "WORDS", [word for word in qwen_reranker.WORDS if word != "yes"])
    directory = save(tmp_path, GENERATIVE, qwen_reranker.weights(GENERATIVE), qwen_reranker.tokenizer())
    with pytest.raises(CheckpointError, match="should have the tokens 'yes' and 'no'"):
        qwen_reranker.load(directory, "qwen")
