"""ColBERT against a plain reading written here, one text at a time, over other implementations of the backbones."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from fundament.catalog import CATALOG
from fundament.core import Embed, Model, MultiVectors, Role
from fundament.engine.local import finish
from fundament.errors import CheckpointError, InputError, TooLongError
from fundament.models import family_of
from tests.checkpoints import assert_same_alone, load, resave, texts
from tests.checkpoints.colbert import DIM, colbert_v1, colbert_v2
from tests.golden import publishers
from tests.parity.test_jina_bert import slow_forward

FAMILIES = {"v1": "jina_bert", "v1, attending": "jina_bert", "v2": "xlm_roberta"}
TEXTS = ["", "a", "the search, engine. finds?", "-", "?!,.", "naïve 東京 - 🙂, the", *texts([1, 3, 9]), "a b, " * 20]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("colbert")
    return {
        "v1": colbert_v1(root / "v1"),
        "v1, attending": colbert_v1(root / "v1a", attend_to_mask_tokens=True, query_maxlen=40),
        # What the file says of mask tokens, the publisher's advice overrides.
        "v2": colbert_v2(root / "v2", {"query_maxlen": 32, "attend_to_mask_tokens": False}),
    }


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, Model]:
    return {name: open_model(name, directory) for name, directory in directories.items()}


def open_model(name: str, directory: Path, **facts: Any) -> Model:
    return load(directory, FAMILIES[name], **{"context": 300, "dim": DIM, "outputs": ("multi",), **facts})


def vectors(model: Model, inputs: list[str], role: Role | None, **fields: Any) -> MultiVectors:
    call = Embed(inputs=inputs, output="multi", role=role, **fields)
    items = model.prepare(call)
    made = finish(model, call, items, model.forward(items))
    assert isinstance(made, MultiVectors)
    return made


def backbone(name: str, directory: Path) -> Callable[[list[int], int], Tensor]:
    """From ids, and how many of them are attended to, to hidden states."""
    if name != "v2":
        return lambda ids, visible: slow_forward(directory, {"prefix": "bert."}, torch.tensor(ids), visible).float()
    config = json.loads((directory / "config.json").read_text())
    keys = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    keys |= {"rope_parameters": {"rope_type": "default", "rope_theta": config["rotary_emb_base"]}}
    model, loaded = JinaEmbeddingsV3Model.from_pretrained(
        directory, config=JinaEmbeddingsV3Config(**keys), output_loading_info=True
    )
    assert not loaded["missing_keys"]

    @torch.inference_mode()
    def run(ids: list[int], visible: int) -> Tensor:
        mask = torch.tensor([[1] * visible + [0] * (len(ids) - visible)])
        states: Tensor = model.eval()(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]
        return states

    return run


def slow_reading(name: str, directory: Path, inputs: list[str], role: str) -> list[Tensor]:
    """As the publishers read texts, written from their description."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    run, projection = backbone(name, directory), load_file(directory / "model.safetensors")["linear.weight"]
    markers = ("[QueryMarker]", "[DocumentMarker]") if name == "v2" else ("[unused0]", "[unused1]")
    mask = tokenizer.token_to_id("<mask>" if name == "v2" else "[MASK]")
    n_query = 40 if name == "v1, attending" else 32
    found = []
    for text in inputs:
        ids = tokenizer.encode(text).ids
        most = n_query - 1 if role == "query" else 299
        ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
        ids = [ids[0], tokenizer.token_to_id(markers[role == "document"]), *ids[1:]]
        if role == "query":
            real = len(ids)
            ids += [mask] * (n_query - real)
            found.append(run(ids, real if name == "v1" else n_query) @ projection.T)
        else:
            states = run(ids, len(ids)) @ projection.T
            skip = {tokenizer.token_to_id(mark) for mark in string.punctuation} - {None}
            found.append(torch.stack([state for i, state in zip(ids, states, strict=True) if i not in skip]))
    return found


@pytest.mark.parametrize("role", ["query", "document"])
@pytest.mark.parametrize("name", FAMILIES)
def test_float32_equals_the_plain_reading(
    name: str, role: Role, directories: dict[str, Path], models: dict[str, Model]
) -> None:
    made = vectors(models[name], TEXTS, role, name_tokens=True)
    expected = slow_reading(name, directories[name], TEXTS, role)
    assert made.tokens is not None
    for vector, named, other in zip(made.vectors, made.tokens, expected, strict=True):
        assert len(named) == len(vector)
        torch.testing.assert_close(torch.from_numpy(vector), other, atol=1e-5, rtol=1e-5)


def for_transformers(directory: Path, copy: Path) -> Path:
    """The same weights with a config of the class that transformers has for them, and with what names the tokens."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    rotations = {"rope_type": "default", "rope_theta": config["rotary_emb_base"]}
    config |= {"model_type": "jina_embeddings_v3", "rope_parameters": rotations}
    (copy / "config.json").write_text(json.dumps(config))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "mask_token": "<mask>"}
    named["unk_token"] = "<unk>"
    (copy / "tokenizer_config.json").write_text(json.dumps(named))
    markers = {"query_token_id": "[QueryMarker]", "doc_token_id": "[DocumentMarker]", "doc_maxlen": 300}
    (copy / "artifact.metadata").write_text(json.dumps(markers | {"query_maxlen": 32}))
    return copy


@pytest.mark.parametrize("role", ["query", "document"])
def test_v2_equals_sentence_transformers(
    role: Role, directories: dict[str, Path], models: dict[str, Model], tmp_path: Path
) -> None:
    """Texts that begin with a word: in this vocabulary a marker written before a mark would add a token."""
    inputs = [text for text in TEXTS if text[:1].isalpha()]
    copy = for_transformers(directories["v2"], tmp_path / "copy")
    answer = publishers.multi_vector(CATALOG["jina-colbert-v2"], str(copy))
    expected = answer({"input": inputs, "role": role})
    made = vectors(models["v2"], inputs, role).vectors
    for vector, other in zip(made, expected, strict=True):
        unit = F.normalize(torch.from_numpy(vector), dim=1)
        torch.testing.assert_close(unit, torch.from_numpy(other), atol=1e-5, rtol=1e-5)


def test_tokens_are_named_and_marks_are_skipped_in_documents_only(models: dict[str, Model]) -> None:
    tokens = vectors(models["v1"], ["the, a?"], "document", name_tokens=True).tokens
    assert tokens == [["[CLS]", "[unused1]", "the", "a", "[SEP]"]]
    tokens = vectors(models["v1"], ["the, a?"], "query", name_tokens=True).tokens
    assert tokens == [["[CLS]", "[unused0]", "the", ",", "a", "?", "[SEP]", *["[MASK]"] * 25]]
    assert vectors(models["v1"], ["the"], None).vectors[0].shape == (4, DIM), "no role means document"


def test_unknown_words_give_vectors(models: dict[str, Model]) -> None:
    tokens = vectors(models["v2"], ["the Ω"], "document", name_tokens=True).tokens
    assert tokens == [["<s>", "[DocumentMarker]", "▁the", "▁", "<unk>", "</s>"]]


def test_a_marker_without_a_place_is_refused(tmp_path: Path) -> None:
    directory = colbert_v2(tmp_path / "v2")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(CheckpointError, match="its marker has no place"):
        open_model("v2", directory)


def test_usage_counts_the_text_alone(models: dict[str, Model]) -> None:
    for role in ("query", "document"):
        made = vectors(models["v1"], ["the, a?", "a"], role)
        assert (made.n_tokens, made.n_truncated) == (6 + 3, 0)


def test_a_long_query_is_cut_and_counted_as_cut(models: dict[str, Model]) -> None:
    made = vectors(models["v1"], ["a " * 40, "a"], "query")
    assert (len(made.vectors[0]), made.n_truncated, made.n_tokens) == (32, 1, 31 + 3)


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_text_longer_than_the_context_is_refused_or_cut(role: Role, models: dict[str, Model]) -> None:
    with pytest.raises(TooLongError, match=r"302 tokens .* maximum of 299"):
        vectors(models["v1"], ["a " * 300], role)
    made = vectors(models["v1"], ["a " * 300], role, truncate=True)
    assert made.n_truncated == 1
    assert len(made.vectors[0]) == (300 if role == "document" else 32)


@pytest.mark.parametrize("name", ["v1", "v2"])
@settings(deadline=None, max_examples=20)
@given(asked=st.lists(st.tuples(st.text(max_size=150), st.sampled_from(["query", "document"])), min_size=2, max_size=6))
def test_a_row_alone_equals_the_row_in_any_company(
    models: dict[str, Model], name: str, asked: list[tuple[str, Role]]
) -> None:
    def forward(asked: list[tuple[str, Role]]) -> list[Tensor]:
        calls = [Embed(inputs=[text], output="multi", role=role, truncate=True) for text, role in asked]
        return [*map(torch.from_numpy, models[name].forward([models[name].prepare(call)[0] for call in calls]))]

    assert_same_alone(forward, asked)


def test_a_checkpoint_of_ones_own_without_metadata_has_the_usual_reading(tmp_path: Path) -> None:
    made = vectors(open_model("v2", colbert_v2(tmp_path)), ["a, the"], "query", name_tokens=True)
    assert made.tokens is not None
    assert made.tokens[0][:4] == ["<s>", "[QueryMarker]", "▁", "a"]
    assert len(made.tokens[0]) == 32


@pytest.mark.parametrize(("name", "model"), [("v1", "jina-colbert-v1-en"), ("v2", "jina-colbert-v2")])
def test_a_published_model_without_its_metadata_is_refused(name: str, model: str, tmp_path: Path) -> None:
    directory = colbert_v1(tmp_path) if name == "v1" else colbert_v2(tmp_path)
    (directory / "artifact.metadata").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=rf"has no artifact\.metadata, .* fundament pull {model}$"):
        open_model(name, directory, id=model, repo=CATALOG[model].repo)


def test_markers_and_marks_are_what_the_metadata_says(tmp_path: Path) -> None:
    directory = colbert_v1(tmp_path, query_token_id="[MASK]", doc_token_id="search", mask_punctuation=False)
    tokens = vectors(open_model("v1", directory), ["a?"], "document", name_tokens=True).tokens
    assert tokens == [["[CLS]", "search", "a", "?", "[SEP]"]]


@pytest.mark.parametrize(
    ("metadata", "facts", "message"),
    [
        ({"query_maxlen": 2}, {}, "query_maxlen of artifact.metadata"),
        ({"query_maxlen": "many"}, {}, "query_maxlen of artifact.metadata"),
        ({"similarity": "l2"}, {}, "similarity of artifact.metadata"),
        ({"attend_to_mask_tokens": "false"}, {}, "attend_to_mask_tokens of artifact.metadata"),
        ({}, {"dim": DIM + 1}, r"linear.weight should have the shape \[13, 48\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    metadata: dict[str, Any], facts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_model("v1", colbert_v1(tmp_path, **metadata), **facts)


def test_a_missing_projection_or_marker_is_refused(tmp_path: Path) -> None:
    directory = colbert_v1(tmp_path)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text().replace("[unused1]", "[else]"))
    with pytest.raises(CheckpointError, match=r"no document marker; it should have \[unused1\]"):
        open_model("v1", directory)
    resave(directory, **{"linear.weight": None})
    with pytest.raises(CheckpointError, match=r"linear\.weight"):
        open_model("v1", directory)


def test_another_output_is_refused(models: dict[str, Model]) -> None:
    with pytest.raises(InputError, match="one vector per token"):
        models["v1"].prepare(Embed(inputs=["a"]))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_the_family_is_found_in_the_config(name: str, directories: dict[str, Path]) -> None:
    assert family_of(json.loads((directories[name] / "config.json").read_text())) == FAMILIES[name]
