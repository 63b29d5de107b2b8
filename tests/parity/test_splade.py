"""SPLADE against transformers' masked language models under sentence-transformers' pooling."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fundament.core import Embed, Model, Role, SparseVectors
from fundament.engine.local import finish
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError, InputError, TooLongError
from fundament.models import family_of, splade
from tests.checkpoints import assert_same_alone, load, resave, texts
from tests.checkpoints.splade import POSITIONS, tokenizer_of, with_idf
from tests.checkpoints.splade import splade as save_splade

CONTEXT = POSITIONS - 2
KINDS = {"bert": ("bert", True), "bert, untied": ("bert", False), "distilbert": ("distilbert", True)}
KINDS |= {"roberta": ("roberta", True), "roberta, untied": ("roberta", False)}
TEXTS = ["", "a", "the search, engine. finds?", "a.b the", "naïve 東京 🙂", *texts([1, 3, 9, 12]), "a b " * 200]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("splade")
    return {name: root / name for name in KINDS}


@pytest.fixture(scope="module")
def references(directories: dict[str, Path]) -> dict[str, PreTrainedModel]:
    return {name: save_splade(directories[name], kind, tied=tied) for name, (kind, tied) in KINDS.items()}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path], references: dict[str, PreTrainedModel]) -> dict[str, Model]:
    return {name: open_model(directory) for name, directory in directories.items()}


def open_model(directory: Path, **facts: Any) -> Model:
    return load(directory, "splade", context=CONTEXT, outputs=("sparse",), **facts)


def weights(model: Model, inputs: list[str], **fields: Any) -> SparseVectors:
    call = Embed(inputs=inputs, output="sparse", truncate=True, **fields)
    items = model.prepare(call)
    made = finish(model, call, items, model.forward(items))
    assert isinstance(made, SparseVectors)
    return made


def whole(made: SparseVectors, kind: str) -> Tensor:
    """Weights over the whole vocabulary, `[texts, vocab]`."""
    tokenizer = tokenizer_of(kind)
    found = torch.zeros(len(made.weights), tokenizer.get_vocab_size())
    for row, weight in zip(found, made.weights, strict=True):
        for token, number in weight.items():
            row[tokenizer.token_to_id(token)] = number
    return found


@torch.inference_mode()
def expected(reference: PreTrainedModel, rows: list[Any], activation: str = "relu") -> Tensor:
    pooling = SpladePooling(pooling_strategy="max", activation_function=activation)
    found = []
    for ids in rows:
        inputs = torch.from_numpy(ids)[None]
        mask = torch.ones_like(inputs)
        logits = reference(inputs, attention_mask=mask).logits
        found.append(pooling({"token_embeddings": logits, "attention_mask": mask})["sentence_embedding"][0])
    return torch.stack(found)


def rows_of(model: Model, inputs: list[str]) -> list[Any]:
    return [item.features["ids"] for item in model.prepare(Embed(inputs=inputs, output="sparse", truncate=True))]


@pytest.mark.parametrize("name", KINDS)
def test_float32_equals_transformers_and_sentence_transformers(
    name: str, models: dict[str, Model], references: dict[str, PreTrainedModel]
) -> None:
    made = weights(models[name], TEXTS)
    other = expected(references[name], rows_of(models[name], TEXTS))
    torch.testing.assert_close(whole(made, KINDS[name][0]), other, atol=1e-5, rtol=1e-5)
    for weight in made.weights:
        assert list(weight.values()) == sorted(weight.values(), reverse=True)
        assert min(weight.values()) > 0
    assert made.n_truncated == 1


def test_a_text_without_tokens_is_named(directories: dict[str, Path], models: dict[str, Model], tmp_path: Path) -> None:
    del models  # the directories are there
    shutil.copytree(directories["bert"], tmp_path / "bare")
    tokenizer = json.loads((tmp_path / "bare" / "tokenizer.json").read_text())
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    model = open_model(tmp_path / "bare")
    with pytest.raises(InputError, match="input -> 1: This text has no tokens"):
        weights(model, ["the", "  "])


def test_blocks_of_the_vocabulary_product_change_nothing(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = whole(weights(models["bert"], TEXTS), "bert")
    monkeypatch.setattr(splade, "_BLOCK_NUMBERS", 7 * 60)  # seven tokens at a time
    torch.testing.assert_close(whole(weights(models["bert"], TEXTS), "bert"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=20)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(models: dict[str, Model], name: str, inputs: list[str]) -> None:
    assert_same_alone(lambda some: whole(weights(models[name], some), KINDS[name][0]), inputs)


def test_the_second_logarithm_is_taken_where_the_pooling_says_so(tmp_path: Path) -> None:
    reference = save_splade(tmp_path, "distilbert")
    folder = tmp_path / "1_SpladePooling"
    folder.mkdir()
    told = {"pooling_strategy": "max", "activation_function": "log1p_relu"}
    (folder / "config.json").write_text(json.dumps(told))
    model = open_model(tmp_path)
    other = expected(reference, rows_of(model, TEXTS), "log1p_relu")
    torch.testing.assert_close(whole(weights(model, TEXTS), "distilbert"), other, atol=1e-5, rtol=1e-5)
    (folder / "config.json").write_text(json.dumps(told | {"pooling_strategy": "sum"}))
    with pytest.raises(CheckpointError, match="pooling 'sum' of 'log1p_relu' is not served"):
        open_model(tmp_path)


IDF = {"the": 2.5, "search": 7.25, "a": 1.5, "##ing": 0.75, "[CLS]": 9.0}


@pytest.mark.parametrize("routed", [False, True])
def test_queries_are_looked_up_where_there_are_weights_for_them(tmp_path: Path, routed: bool) -> None:
    reference = save_splade(tmp_path, "bert")
    inputs = ["the search the the", "searching a", "", "z"]
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]")
    with_idf(tmp_path, IDF)
    static = SparseStaticEmbedding.from_json(str(tmp_path / "idf.json"), tokenizer=fast)
    if routed:
        (tmp_path / "idf.json").unlink()
        folder = tmp_path / "query_0_SparseStaticEmbedding"
        folder.mkdir()
        save_file({"weight": static.weight.detach()}, folder / "model.safetensors")
        routes = {"structure": {"query": [folder.name], "document": ["", "document_1_SpladePooling"]}}
        (tmp_path / "router_config.json").write_text(json.dumps(routes))
    model = open_model(tmp_path)
    made = weights(model, inputs, role="query")
    features = static.preprocess(inputs)
    other = static({key: value.long() for key, value in features.items()})["sentence_embedding"]
    torch.testing.assert_close(whole(made, "bert"), other.detach(), atol=0, rtol=0)
    assert made.weights[0] == {"search": 7.25, "the": 2.5}
    assert made.n_tokens == sum(map(len, rows_of(model, inputs)))
    documents = expected(reference, rows_of(model, inputs))
    torch.testing.assert_close(whole(weights(model, inputs), "bert"), documents, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "structure",
    [
        {"query": ["query_0_MLMTransformer", "query_1_SpladePooling"], "document": ["", "document_1_SpladePooling"]},
        {"query": ["", "query_1_SpladePooling"], "document": ["document_0_SparseStaticEmbedding"]},
        {"query": ["query_0_SparseStaticEmbedding"], "document": ["document_0_MLMTransformer"]},
    ],
)
def test_other_routes_are_refused(tmp_path: Path, structure: dict[str, list[str]]) -> None:
    save_splade(tmp_path, "bert")
    (tmp_path / "router_config.json").write_text(json.dumps({"structure": structure}))
    with pytest.raises(CheckpointError, match=r"router_config\.json: served are documents that run through"):
        open_model(tmp_path)


def test_the_pooling_is_in_the_folder_that_the_modules_name(tmp_path: Path) -> None:
    reference = save_splade(tmp_path, "distilbert")
    for folder, activation in (("1_Pooling", "log1p_relu"), ("7_SpladePooling", "relu")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"activation_function": activation}))
    types = {"": "MLMTransformer", "1_Pooling": "SpladePooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in types.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    model = open_model(tmp_path)
    other = expected(reference, rows_of(model, TEXTS), "log1p_relu")
    torch.testing.assert_close(whole(weights(model, TEXTS), "distilbert"), other, atol=1e-5, rtol=1e-5)


def test_prompts_are_refused(tmp_path: Path) -> None:
    save_splade(tmp_path, "bert")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "people: "}}))
    with pytest.raises(CheckpointError, match="puts prompts before texts, for a model of this kind"):
        from_argument(f"mine={tmp_path}", tmp_path)


@pytest.fixture(scope="module")
def weighing(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("weighing")
    save_splade(directory, "bert")
    return open_model(with_idf(directory, IDF))


def in_company(model: Model, asked: list[tuple[str, Role]]) -> Tensor:
    """Weights `[rows, vocab]` of rows that share batches wherever they may."""
    calls = [Embed(inputs=[text], output="sparse", role=role) for text, role in asked]
    items = [item for call in calls for item in model.prepare(call)]
    arrays: list[Any] = [None] * len(items)
    for mate in {item.mate for item in items}:
        places = [place for place, item in enumerate(items) if item.mate == mate]
        for place, array in zip(places, model.forward([items[place] for place in places]), strict=True):
            arrays[place] = array
    return whole(finish(model, calls[0], items, arrays), "bert")


worded = st.tuples(
    st.lists(st.sampled_from(["the", "search", "a", "z", "searching", "東"]), max_size=6).map(" ".join),
    st.sampled_from(["query", "document"]),
)


@settings(deadline=None, max_examples=25)
@given(asked=st.lists(worded, min_size=2, max_size=7))
def test_a_query_that_is_looked_up_alone_equals_it_in_mixed_company(
    weighing: Model, asked: list[tuple[str, Role]]
) -> None:
    assert_same_alone(partial(in_company, weighing), asked)


def test_without_such_weights_queries_run_as_documents_do(models: dict[str, Model]) -> None:
    assert weights(models["bert"], ["the"], role="query") == weights(models["bert"], ["the"], role="document")


@pytest.mark.parametrize("idf", [{"nowhere": 1.0}, {"the": "much"}])
def test_weights_of_no_token_are_refused(tmp_path: Path, idf: dict[str, Any]) -> None:
    save_splade(tmp_path, "bert")
    with pytest.raises(CheckpointError, match="weighs no known token"):
        open_model(with_idf(tmp_path, idf))


def test_dots_in_tokens_are_written_for_elasticsearch_where_the_catalogue_says_so(tmp_path: Path) -> None:
    save_splade(tmp_path, "bert")
    tensors = load_file(tmp_path / "model.safetensors")
    bias = tensors["cls.predictions.bias"]
    bias[tokenizer_of("bert").token_to_id("a.b")] = 50.0
    resave(tmp_path, **{"cls.predictions.bias": bias})
    assert next(iter(weights(open_model(tmp_path), ["a"]).weights[0])) == "a.b"
    assert next(iter(weights(open_model(tmp_path, dotless=True), ["a"]).weights[0])) == "a__b"


@pytest.mark.parametrize("name", ["cls.predictions.bias", "cls.predictions.transform.dense.weight"])
def test_a_model_without_a_head_is_refused(tmp_path: Path, name: str) -> None:
    save_splade(tmp_path, "bert")
    with pytest.raises(CheckpointError, match="has no head that predicts tokens"):
        open_model(resave(tmp_path, **{name: None}))


def test_a_vocabulary_that_is_not_tied_has_to_be_there(tmp_path: Path) -> None:
    save_splade(tmp_path, "bert")
    with pytest.raises(CheckpointError, match=r"has no cls\.predictions\.decoder\.weight"):
        open_model(resave(tmp_path, config={"tie_word_embeddings": False}))


def test_unknown_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    save_splade(tmp_path, "bert")
    with pytest.raises(CheckpointError, match=r"not known to the model: classifier\.weight"):
        open_model(resave(tmp_path, **{"classifier.weight": torch.zeros(2, 2)}))
    resave(tmp_path, **{"classifier.weight": None, "cls.predictions.transform.LayerNorm.bias": None})
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: cls.predictions.transform.LayerNorm.bias"):
        open_model(tmp_path)


def test_long_texts_and_other_outputs_are_refused(models: dict[str, Model]) -> None:
    with pytest.raises(TooLongError, match=f"maximum of {CONTEXT}"):
        models["bert"].prepare(Embed(inputs=["a " * 200], output="sparse"))
    with pytest.raises(InputError, match="a weight per word piece"):
        models["bert"].prepare(Embed(inputs=["a"]))


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_a_directory_of_ones_own_is_known_by_its_head(
    name: str, directories: dict[str, Path], references: dict[str, PreTrainedModel], tmp_path: Path
) -> None:
    assert family_of(json.loads((directories[name] / "config.json").read_text())) == "splade"
    spec = from_argument(f"mine={directories[name]}", tmp_path).spec
    assert (spec.outputs, spec.dim) == (("sparse",), tokenizer_of(name).get_vocab_size())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "elser_model_2.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    for given_path in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"elser_model_2\.pt is TorchScript.*--allow-torchscript"):
            from_argument(f"elser-v2={given_path}", tmp_path)


def test_ids_stay_exact_as_float32(models: dict[str, Model]) -> None:
    items = models["bert"].prepare(Embed(inputs=["the"], output="sparse"))
    array = models["bert"].forward(items)[0]
    assert array.dtype == np.float32
    assert (array[0] == array[0].astype(int)).all()
