"""MPNet against transformers' own class and against sentence-transformers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from transformers import MPNetModel

from fundament.core import Embed, Model
from fundament.engine.loading import load_model
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import assert_same_alone, embed, load, resave, texts
from tests.checkpoints.mpnet import mpnet
from tests.conftest import FLOAT32

CONTEXT = 400


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mpnet(tmp_path_factory.mktemp("mpnet"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load(directory, "mpnet", context=CONTEXT)


def test_float32_equals_the_reference(directory: Path, model: Model) -> None:
    inputs = ["", "a", *texts([1, 2, 3, 3, 5, 9, 20, 40, 300])]
    rows = [torch.from_numpy(item.features["ids"]) for item in model.prepare(Embed(inputs=inputs, truncate=True))]
    assert max(map(len, rows)) == CONTEXT
    network = MPNetModel.from_pretrained(directory).eval()
    with torch.inference_mode():
        expected = torch.stack([network(input_ids=row[None]).last_hidden_state[0].mean(0) for row in rows])
    torch.testing.assert_close(embed(model, inputs), expected, atol=1e-5, rtol=1e-5)


def test_names_behind_a_prefix_and_the_head_of_a_masked_language_model(tmp_path: Path, model: Model) -> None:
    directory = resave(mpnet(tmp_path, prefix="mpnet."), **{"lm_head.dense.weight": torch.zeros(48, 48)})
    assert torch.equal(embed(load(directory, "mpnet", context=CONTEXT), texts([9])), embed(model, texts([9])))


def test_bfloat16_is_close_to_float32(directory: Path, model: Model) -> None:
    halved = load(directory, "mpnet", context=CONTEXT, dtype=torch.bfloat16)
    assert F.cosine_similarity(embed(halved, texts([1, 4, 30])), embed(model, texts([1, 4, 30]))).min() > 0.995


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(model: Model, inputs: list[str]) -> None:
    assert_same_alone(partial(embed, model), inputs)


def with_tokenizer(directory: Path, **told: Any) -> Path:
    """With the files that sentence-transformers reads its tokenizer by."""
    kind = {"tokenizer_class": "MPNetTokenizer", "do_lower_case": True, "model_max_length": 512}
    (directory / "tokenizer_config.json").write_text(json.dumps(kind | told))
    modules = [{"idx": i, "name": str(i), "path": path} for i, path in enumerate(("", "1_Pooling"))]
    for module, name in zip(modules, ("Transformer", "Pooling"), strict=True):
        module["type"] = f"sentence_transformers.models.{name}"
    (directory / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory


def test_a_directory_of_ones_own_gives_the_vectors_of_sentence_transformers(tmp_path: Path) -> None:
    directory, inputs = with_tokenizer(mpnet(tmp_path)), ["The Search", *texts([1, 5, 40])]
    local = from_argument(f"mine={directory}", tmp_path)
    assert (local.spec.family, local.spec.dim, local.spec.context) == ("mpnet", 48, CONTEXT)
    expected = SentenceTransformer(str(directory), device="cpu").encode(inputs, convert_to_tensor=True)
    torch.testing.assert_close(embed(load_model(local, FLOAT32), inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"pad_token_id": 0}, {"relative_attention_num_buckets": 64}])
def test_what_transformers_passes_over_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    [key] = changes
    with pytest.raises(CheckpointError, match=f"{key} .*, which is not served"):
        load(mpnet(tmp_path, **changes), "mpnet", context=CONTEXT)


def test_words_that_the_tokenizer_would_read_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"means do_lower_case False, and tokenizer\.json says True"):
        from_argument(f"mine={with_tokenizer(mpnet(tmp_path), do_lower_case=False)}", tmp_path)


def test_a_longer_context_than_the_table_has_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has positions for {CONTEXT} tokens"):
        load(directory, "mpnet", context=CONTEXT + 1)


def test_a_missing_tensor_and_a_classifiers_head_are_named(tmp_path: Path) -> None:
    bias = "encoder.relative_attention_bias.weight"
    resave(mpnet(tmp_path), **{bias: None, "classifier.out_proj.weight": torch.zeros(1, 48)})
    with pytest.raises(CheckpointError, match=rf"checkpoint: {bias}; not known to the model: classifier\.out_proj"):
        load(tmp_path, "mpnet", context=CONTEXT)
