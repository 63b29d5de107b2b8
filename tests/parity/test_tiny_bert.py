"""jina-embedding-t-en-v1 is a BERT of other proportions: 12 heads of 26 numbers each."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from fundament.backbone.device import Placement
from fundament.catalog import CATALOG
from fundament.core import Embed, Model
from fundament.engine.loading import load_model
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import assert_same_alone, embed, texts, word_piece

SPEC = CATALOG["jina-embedding-t-en-v1"]
PLACEMENT = Placement(torch.device("cpu"), torch.float32)


def tiny_bert(directory: Path, tokenizer: Tokenizer, **config: int) -> BertModel:
    torch.manual_seed(0)
    published = {"hidden_size": 312, "num_attention_heads": 12, "max_position_embeddings": 512}
    small = {"vocab_size": tokenizer.get_vocab_size(), "num_hidden_layers": 2, "intermediate_size": 40}
    model = BertModel(BertConfig(**published | small | config)).eval()
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return model


def test_float32_equals_the_reference(tmp_path: Path) -> None:
    reference = tiny_bert(tmp_path, word_piece())
    model = load_model(from_argument(f"{SPEC.id}={tmp_path}", tmp_path), PLACEMENT)
    inputs = texts([1, 2, 3, 5, 20, 300])
    rows = [torch.from_numpy(item.features["ids"]) for item in model.prepare(Embed(inputs=inputs, truncate=True))]
    assert max(map(len, rows)) == 512
    with torch.inference_mode():
        expected = torch.stack([reference(input_ids=row[None]).last_hidden_state[0].mean(0) for row in rows])
    torch.testing.assert_close(embed(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("tiny_bert")
    tiny_bert(directory, word_piece())
    return load_model(from_argument(f"{SPEC.id}={directory}", directory), PLACEMENT)


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(model: Model, inputs: list[str]) -> None:
    assert_same_alone(partial(embed, model), inputs)


def test_a_shorter_position_table_is_refused(tmp_path: Path) -> None:
    tiny_bert(tmp_path, word_piece(), max_position_embeddings=511)
    with pytest.raises(CheckpointError, match="reads 512; is it another model"):
        load_model(from_argument(f"{SPEC.id}={tmp_path}", tmp_path), PLACEMENT)
