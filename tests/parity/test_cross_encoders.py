"""Cross-encoders against the classes of transformers, and JinaBERT's against the plain forward pass."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder as SentenceTransformersCrossEncoder
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from fundament.core import Model, Rerank
from fundament.engine.loading import load_model
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError, InputError, TooLongError
from fundament.models import family_of
from tests.checkpoints import llama, load, rank, resave, texts
from tests.checkpoints.cross_encoder import (
    CLASSES,
    bert_ranker,
    distilbert_ranker,
    jina_bert_ranker,
    llama_ranker,
    roberta_ranker,
    xlm_roberta_ranker,
)
from tests.checkpoints.xlm_roberta import POSITIONS, flash_tensors, renamed
from tests.conftest import FLOAT32
from tests.parity.test_jina_bert import slow_forward

CONTEXT, OVERLAP = POSITIONS - 2, 9
QUERY = "what the search finds"
DOCUMENTS = ["", "a", "the the what", "naïve 東京 search", QUERY, *texts([1, 2, 3, 5, 9, 12])]
FAMILIES = {
    "bert": "bert",
    "distilbert": "distilbert",
    "eurobert": "eurobert",
    "flash": "xlm_roberta",
    "jina": "jina_bert",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "roberta": "xlm_roberta",
    "stock": "xlm_roberta",
}

Logit = Callable[[list[int], list[int]], float]
"""From the ids of a pair and their types to its logit."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cross_encoders")
    return {
        "bert": bert_ranker(root / "bert"),
        "jina": jina_bert_ranker(root / "jina"),
        "stock": xlm_roberta_ranker(root / "stock"),
        "flash": xlm_roberta_ranker(root / "flash", names="flash"),
        "distilbert": distilbert_ranker(root / "distilbert"),
        "eurobert": llama_ranker(root / "eurobert", "eurobert"),
        "roberta": roberta_ranker(root / "roberta"),
        "qwen2": llama_ranker(root / "qwen2", "qwen2"),
        "qwen3": llama_ranker(root / "qwen3", "qwen3", pair=f"$A {llama.END} $B {llama.END}", pad_token_id=None),
    }


def open_model(name: str, directory: Path, **facts: Any) -> Model:
    return load(directory, FAMILIES[name], **{"context": CONTEXT, "kind": "reranker", "dim": 0, **facts})


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Model]:
    return {name: open_model(name, directory) for name, directory in directories.items()}


def reference(name: str, directory: Path) -> Logit:
    tensors = load_file(directory / "model.safetensors")
    if name == "jina":

        def plain(ids: list[int], types: list[int]) -> float:
            assert not any(types)
            first = slow_forward(directory, {"prefix": "bert."}, torch.tensor(ids))[0]
            inner = torch.tanh(
                first @ tensors["bert.pooler.dense.weight"].double().T + tensors["bert.pooler.dense.bias"]
            )
            return float(inner @ tensors["classifier.weight"][0].double() + tensors["classifier.bias"])

        return plain
    model = classifier(name, directory, tensors)
    typed = {"bert", "stock", "flash"}

    @torch.inference_mode()
    def logit(ids: list[int], types: list[int]) -> float:
        more = {"token_type_ids": torch.tensor([types])} if name in typed else {}
        return float(model(input_ids=torch.tensor([ids]), **more).logits)

    return logit


def classifier(name: str, directory: Path, tensors: dict[str, Tensor]) -> nn.Module:
    """transformers' class with the same weights, every one of them used."""
    if name in CLASSES:
        return CLASSES[name][1].from_pretrained(directory).eval()
    config = XLMRobertaConfig.from_pretrained(directory, num_labels=1)
    model = XLMRobertaForSequenceClassification(config)
    bare = flash_tensors(config.vocab_size, table=True)
    stock = {f"roberta.{k}": t for k, t in renamed(bare, "stock").items() if "pooler" not in k}
    model.load_state_dict(stock | {k: t for k, t in tensors.items() if k.startswith("classifier")}, strict=True)
    return model.eval()


def pair(directory: Path, query: str, document: str) -> tuple[list[int], list[int]]:
    encoding = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(query, document)
    return encoding.ids, encoding.type_ids


def probabilities(logits: list[float]) -> np.ndarray:
    return torch.tensor(logits, dtype=torch.float64).sigmoid().float().numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_equal_the_reference(name: str, directories: dict[str, Path], models: dict[str, Model]) -> None:
    logit = reference(name, directories[name])
    for query in (QUERY, "", "a"):
        expected = probabilities([logit(*pair(directories[name], query, document)) for document in DOCUMENTS])
        found = rank(models[name], query, DOCUMENTS)
        np.testing.assert_allclose(found.scores, expected, atol=1e-5)
        assert np.ptp(expected) > 0.05, "the documents can be told apart"
        assert found.n_tokens == sum(len(pair(directories[name], query, document)[0]) for document in DOCUMENTS)
        assert found.n_truncated == 0


def test_the_types_of_tokens_matter(directories: dict[str, Path]) -> None:
    ids, types = pair(directories["bert"], QUERY, "the search")
    assert set(types) == {0, 1}
    logit = reference("bert", directories["bert"])
    assert abs(logit(ids, types) - logit(ids, [0] * len(ids))) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_close_to_float32(name: str, directories: dict[str, Path], models: dict[str, Model]) -> None:
    halved = open_model(name, directories[name], dtype=torch.bfloat16)
    np.testing.assert_allclose(
        rank(halved, QUERY, DOCUMENTS).scores, rank(models[name], QUERY, DOCUMENTS).scores, atol=0.1
    )


@settings(deadline=None, max_examples=20)
@given(data=st.data(), query=st.text(max_size=30))
def test_a_row_alone_equals_the_row_in_any_company(models: dict[str, Model], data: st.DataObject, query: str) -> None:
    documents = data.draw(st.lists(st.text(max_size=80), min_size=1, max_size=6))
    for model in models.values():
        together = rank(model, query, documents).scores
        alone = [rank(model, query, [document]).scores[0] for document in documents]
        np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_shuffled_documents_keep_their_scores(name: str, models: dict[str, Model]) -> None:
    order = np.random.default_rng(3).permutation(len(DOCUMENTS))
    shuffled = rank(models[name], QUERY, [DOCUMENTS[place] for place in order]).scores
    np.testing.assert_allclose(shuffled, rank(models[name], QUERY, DOCUMENTS).scores[order], atol=1e-5)


def test_probabilities_near_one_and_zero_are_told_apart(tmp_path: Path, models: dict[str, Model]) -> None:
    directory = bert_ranker(tmp_path)
    expected = rank(models["bert"], QUERY, DOCUMENTS).scores.argsort()
    bias = load_file(directory / "model.safetensors")["classifier.bias"]
    for shift in (-20, 20):
        resave(directory, **{"classifier.bias": bias + shift})
        sure = rank(open_model("bert", directory), QUERY, DOCUMENTS).scores
        assert sure.argsort().tolist() == expected.tolist()
        assert len(set(sure)) == len(DOCUMENTS)


def test_equal_documents_have_equal_scores(models: dict[str, Model]) -> None:
    for model in models.values():
        scores = rank(model, QUERY, ["a", *DOCUMENTS, "a", DOCUMENTS[3]]).scores
        assert scores[0] == scores[2] == scores[-2]
        assert scores[4] == scores[-1]
        assert len(model.prepare(Rerank(query=QUERY, documents=["a", "b", "a"]))) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_longer_document_is_cut(name: str, directories: dict[str, Path], models: dict[str, Model]) -> None:
    long = "a b c d e f " * 40
    ids, types = pair(directories[name], QUERY, long)
    n_after = len(models[name].frame.after)
    cut = [*ids[: CONTEXT - n_after], *ids[len(ids) - n_after :]], types[:CONTEXT]
    found = rank(models[name], QUERY, ["a", long])
    np.testing.assert_allclose(found.scores[1], probabilities([reference(name, directories[name])(*cut)])[0], atol=1e-5)
    assert found.n_truncated == 1
    assert found.n_tokens == len(pair(directories[name], QUERY, "a")[0]) + CONTEXT
    with pytest.raises(TooLongError, match=r"Document 1 has \d+ tokens .* 'truncate: true'"):
        models[name].prepare(Rerank(query=QUERY, documents=["a", long], truncate=False))


def test_a_longer_query_leaves_documents_half_of_the_context(models: dict[str, Model]) -> None:
    model = models["bert"]
    long = "a " * 200
    [item] = model.prepare(Rerank(query=long, documents=[long]))
    assert item.n_tokens == CONTEXT
    assert item.features["second"] == 2 + (CONTEXT - 3) // 2
    with pytest.raises(TooLongError, match="The query has 200 tokens"):
        model.prepare(Rerank(query=long, documents=["a"], truncate=False))


def test_lengths_that_the_caller_asks_for(models: dict[str, Model]) -> None:
    words = "a b c d e f g h"
    for model in models.values():
        [query] = model.tokenizer.pieces([words])
        shorter = "a b c" if len(query) == 8 else None
        fields = {"max_document_tokens": 3, "max_query_tokens": 3}
        found = rank(model, words, [words], truncate=False, **fields)
        assert found.n_tokens == 6 + model.frame.n_special
        assert found.n_truncated == 1
        if shorter:
            np.testing.assert_allclose(found.scores, rank(model, shorter, [shorter]).scores, atol=1e-6)


@pytest.mark.parametrize("n_words", [10, 115, 116, 117, 125, 126, 200, 500])
def test_windows_cover_a_long_document_and_the_best_counts(directories: dict[str, Path], n_words: int) -> None:
    """Each window is a pair of its own, scored by the reference."""
    model = open_model("flash", directories["flash"], window_overlap=OVERLAP)
    logit = reference("flash", directories["flash"])
    document = " ".join(np.random.default_rng(n_words).choice(list("abcdefgh"), n_words))
    call = Rerank(query=QUERY, documents=["a", document], truncate=False)
    items = [item for item in model.prepare(call) if item.features["document"] == 1]
    [query], [whole] = model.tokenizer.pieces([QUERY]), model.tokenizer.pieces([document])
    room = CONTEXT - 4 - len(query)
    rows = [item.features["ids"].tolist() for item in items]
    read = [row[len(query) + 3 : -1] for row in rows]
    assert all(len(part) == min(room, len(whole)) for part in read)
    covered, shared = read[0], []
    for before, part in pairwise(read):
        overlap = next(n for n in range(OVERLAP, room + 1) if before[-n:] == part[:n])
        covered, shared = covered + part[overlap:], [*shared, overlap]
    assert covered == whole.tolist()
    assert all(n == OVERLAP for n in shared[:-1])
    found = rank(model, QUERY, ["a", document])
    expected = probabilities([max(logit(row, [0] * len(row)) for row in rows)])
    np.testing.assert_allclose(found.scores[1], expected[0], atol=1e-5)
    assert found.n_truncated == 0
    assert found.n_tokens == len(pair(directories["flash"], QUERY, "a")[0]) + len(query) + 4 + len(whole)


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tells 3 labels apart"):
        open_model("bert", bert_ranker(tmp_path, n_labels=3))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bert", "classifier.weight"),
        ("bert", "bert.pooler.dense.bias"),
        ("jina", "classifier.bias"),
        ("flash", "classifier.dense.weight"),
        ("stock", "classifier.out_proj.bias"),
        ("stock", "roberta.encoder.layer.1.output.dense.weight"),
    ],
)
def test_a_missing_tensor_is_named(name: str, tensor: str, tmp_path: Path) -> None:
    make = {"bert": bert_ranker, "jina": jina_bert_ranker}.get(name)
    directory = make(tmp_path) if make else xlm_roberta_ranker(tmp_path, names=name)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"not in the checkpoint: {tensor};"):
        open_model(name, resave(directory, **{tensor: None}))


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not known to the model: classifier\.other\.weight$"):
        open_model("bert", resave(bert_ranker(tmp_path), **{"classifier.other.weight": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("$A $B", "no special token before a pair"),
        *(
            (template, "a pair of texts in a way that is not served")
            for template in (
                "[CLS]:1 $A:1 [SEP]:1 $B:0 [SEP]:0",
                "[CLS]:1 $A:1 [SEP]:1 $B:1 [SEP]:1",
                "[CLS] $A [SEP] $B:2 [SEP]:2",
                "[CLS] $B [SEP] $A:1 [SEP]:1",
                "[CLS] $A [SEP] $A [SEP] $B:1 [SEP]:1",
            )
        ),
    ],
)
def test_a_tokenizer_that_frames_pairs_otherwise_is_refused(template: str, words: str, tmp_path: Path) -> None:
    path = bert_ranker(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="$A", pair=template, special_tokens=special)
    tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match=words):
        open_model("bert", tmp_path)


@pytest.mark.parametrize("single", ["[CLS] $A:1 [SEP]", "[CLS] $A [SEP] $A [SEP]"])
def test_a_tokenizer_that_frames_a_text_otherwise_is_refused(single: str, tmp_path: Path) -> None:
    path = bert_ranker(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match="repeats a text, or gives its tokens types"):
        open_model("bert", tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_of_ones_own_ranks(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    spec = from_argument(f"mine={directories[name]}", tmp_path).spec
    assert (spec.kind, spec.family, spec.score, spec.dim) == ("reranker", FAMILIES[name], "probability", 0)


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_eurobert_pools_as_its_config_says(pooling: str, tmp_path: Path) -> None:
    directory = llama_ranker(tmp_path, "eurobert", pair=f"{llama.END} $A $B", classifier_pooling=pooling)
    logit = reference("eurobert", directory)
    expected = probabilities([logit(*pair(directory, QUERY, document)) for document in DOCUMENTS])
    found = rank(open_model("eurobert", directory), QUERY, DOCUMENTS)
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="classifier_pooling 'max'; known are bos, mean, late"):
        open_model("eurobert", resave(directory, config={"classifier_pooling": "max"}))


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_eurobert_pools_as_its_config_says_in_the_publishers_words(pooling: str, tmp_path: Path) -> None:
    directory = llama_ranker(tmp_path, "eurobert", pair=f"{llama.END} $A $B", classifier_pooling=pooling)
    expected = rank(open_model("eurobert", directory), QUERY, DOCUMENTS)
    config = json.loads((directory / "config.json").read_text())
    del config["classifier_pooling"]
    (directory / "config.json").write_text(json.dumps(config | {"clf_pooling": pooling}))
    np.testing.assert_allclose(rank(open_model("eurobert", directory), QUERY, DOCUMENTS).scores, expected.scores)
    other = "mean" if pooling == "bos" else "bos"
    with pytest.raises(CheckpointError, match=f"classifier_pooling '{other}' and clf_pooling; take one away"):
        open_model("eurobert", resave(directory, config={"classifier_pooling": other}))


def test_a_causal_classifier_scores_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    """As transformers' classes do, in a text that spells the token too; they need no token in front of a pair."""
    plain = llama_ranker(tmp_path / "plain", "qwen2", pair=None)
    model, logit = open_model("qwen2", plain), reference("qwen2", plain)
    documents = ["the", f"the{llama.END}", f"the{llama.END}{llama.END}in", llama.END * 3]
    expected = probabilities([logit(*pair(plain, "who", document)) for document in documents])
    scores = rank(model, "who", documents).scores
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    only = probabilities([logit(*pair(plain, "", llama.END * 3))])
    np.testing.assert_allclose(rank(model, "", [llama.END * 3]).scores, only, atol=1e-5)
    other = open_model("qwen2", resave(plain, config={"pad_token_id": None}))
    assert abs(rank(other, "who", documents).scores[1] - scores[1]) > 1e-3
    with pytest.raises(InputError, match="documents -> 1: Neither it nor the query has a token"):
        model.prepare(Rerank(query="", documents=["a", "", ""]))


def test_pairs_are_read_as_sentence_transformers_reads_them(tmp_path: Path) -> None:
    directory = llama_ranker(tmp_path, "qwen3")
    PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), pad_token=llama.END, model_max_length=512
    ).save_pretrained(directory)
    pairs = [(QUERY, document) for document in DOCUMENTS]
    expected = SentenceTransformersCrossEncoder(str(directory), device="cpu").predict(pairs)
    np.testing.assert_allclose(rank(open_model("qwen3", directory), QUERY, DOCUMENTS).scores, expected, atol=1e-5)


def test_pairs_of_bytes_are_read_as_sentence_transformers_reads_them(tmp_path: Path) -> None:
    directory = roberta_ranker(tmp_path)
    RobertaTokenizer.from_pretrained(directory, model_max_length=CONTEXT).save_pretrained(directory)
    expected = SentenceTransformersCrossEncoder(str(directory), device="cpu").predict(
        [(QUERY, document) for document in DOCUMENTS]
    )
    model = load_model(from_argument(f"mine={directory}", tmp_path), FLOAT32)
    np.testing.assert_allclose(rank(model, QUERY, DOCUMENTS).scores, expected, atol=1e-5)


QWEN2_CHAT = (  # of Qwen2-Instruct: it writes any role
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
)
NAMED = "".join(
    f"{{{{ messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first }}}}"
    for role in ("query", "document")
)
PARTS = "{% for message in messages %}{{ message['content'][0]['text'] | upper }}{% endfor %}"


JSON = "{% for message in messages %}{{ message['content'] | tojson(ensure_ascii=False) }}{% endfor %}"
BROKEN = ("{% unknown %}", "{{ 1 / 0 }}", "{{ '{}{}'.format(1) }}", "{{ range(10 ** 9) }}", "{{ messages + 1 }}")


@pytest.mark.parametrize("template", [QWEN2_CHAT, NAMED, PARTS, "{{ messages }}", JSON, *BROKEN])
def test_a_classifier_that_is_prompted_is_refused(tmp_path: Path, template: str) -> None:
    directory = llama_ranker(tmp_path, "qwen3")
    for told in (template, [{"name": "tool", "template": ""}, {"name": "default", "template": template}]):
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": told}))
        with pytest.raises(CheckpointError, match=r"chat template that writes a query and a document.*take the temp"):
            open_model("qwen3", directory)
    (directory / "chat_template.jinja").write_text(template)
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="chat template that writes a query and a document"):
        open_model("qwen3", directory)


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('only users') }}",
    ],
)
def test_a_template_that_writes_no_pairs_is_let_be(tmp_path: Path, template: str) -> None:
    directory = llama_ranker(tmp_path, "qwen3")
    (directory / "chat_template.jinja").write_text(template)
    open_model("qwen3", directory)
    (directory / "chat_template.jinja").write_text(NAMED)
    (directory / "sentence_bert_config.json").write_text(json.dumps({"modality_config": {"text": {}}}))
    open_model("qwen3", directory)


def test_the_catalogues_rerankers_are_no_classifiers(tmp_path: Path) -> None:
    local = from_argument(f"qwen3-reranker-0.6b={llama_ranker(tmp_path, 'qwen3')}", tmp_path)
    with pytest.raises(CheckpointError, match=r"not known to the model: score\.weight"):
        load_model(local, FLOAT32)


def test_a_config_without_a_model_type_is_told_by_its_architecture() -> None:
    architectures = ["XLMRobertaForSequenceClassification"]
    assert family_of({"architectures": architectures}) == "xlm_roberta"
    assert family_of({"architectures": ["SomethingElse"]}) is None
    assert family_of({"architectures": architectures, "model_type": "other"}) is None
