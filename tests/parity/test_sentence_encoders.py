"""Encoders that the hub has many of, as sentence-transformers saves them, against sentence-transformers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    CamembertForMaskedLM,
    CamembertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from fundament.core import Embed, Model
from fundament.engine.loading import load_model
from fundament.engine.local import finish
from fundament.engine.weights import from_argument
from fundament.errors import CheckpointError
from tests.checkpoints import assert_same_alone, byte_bpe, embed, llama, random_tensors, texts, unigram, word_piece
from tests.checkpoints.dense import IDENTITY, distilbert, write_dense
from tests.checkpoints.t5 import sentence_piece
from tests.conftest import FLOAT32

POSITIONS = 40
INPUTS = [
    "",
    "a",
    " the search",
    "the  what",
    *texts([1, 2, 3, 3, 5, 9]),
    "naïve 東京 <unk> search",
    "the search " * 60,
]
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40}
ROBERTA = SIZES | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1}
DISTILBERT = {"dim": 48, "n_heads": 6, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": POSITIONS}

QWEN = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": POSITIONS}
T5 = {"d_model": 48, "d_kv": 8, "d_ff": 40, "num_heads": 6, "num_layers": 2, "relative_attention_num_buckets": 32}
POOLINGS = ("mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean")


@dataclass(frozen=True, slots=True)
class Kind:
    """A make of encoder: transformers' classes, the encoder alone and with what predicts tokens, and its tokenizer."""

    config: type[PreTrainedConfig]
    encoder: type[PreTrainedModel]
    predictor: type[PreTrainedModel]
    tokenizer: Callable[[], Tokenizer]
    sizes: dict[str, Any]
    wrap: type[PreTrainedTokenizerFast] = PreTrainedTokenizerFast


KINDS = {
    "roberta": Kind(RobertaConfig, RobertaModel, RobertaForMaskedLM, byte_bpe, ROBERTA, RobertaTokenizer),
    "bert": Kind(BertConfig, BertModel, BertForMaskedLM, word_piece, SIZES | {"max_position_embeddings": POSITIONS}),
    "distilbert": Kind(DistilBertConfig, DistilBertModel, DistilBertForMaskedLM, word_piece, DISTILBERT),
    "camembert": Kind(CamembertConfig, CamembertModel, CamembertForMaskedLM, unigram, ROBERTA),
    "t5": Kind(T5Config, T5EncoderModel, T5ForConditionalGeneration, sentence_piece, T5),
    "qwen2": Kind(Qwen2Config, Qwen2Model, Qwen2ForCausalLM, partial(llama.tokenizer, ends=True), QWEN),
    "qwen3": Kind(Qwen3Config, Qwen3Model, Qwen3ForCausalLM, partial(llama.tokenizer, ends=True), QWEN),
}


def write(directory: Path, name: str, *, pooling: str = "mean", **config: Any) -> Path:
    """A sentence encoder with random weights; its tokenizer cuts texts where the positions end."""
    kind, plain = KINDS[name], directory / "plain"
    tokenizer = kind.tokenizer()
    model = kind.encoder(kind.config(vocab_size=tokenizer.get_vocab_size(), **kind.sizes | config))
    model.load_state_dict(random_tensors({name: tuple(t.shape) for name, t in model.state_dict().items()}), strict=True)
    model.save_pretrained(plain)
    tokenizer.save(str(plain / "tokenizer.json"))
    ends = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>"}
    if name.startswith("qwen"):
        ends = {"pad_token": llama.END, "padding_side": "left"}
    if name == "t5":
        ends = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    if name in ("bert", "distilbert"):
        ends = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    kind.wrap.from_pretrained(plain, model_max_length=POSITIONS, **ends).save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(48, pooling)]
    SentenceTransformer(modules=modules, device="cpu").save(str(directory / "saved"))
    return directory / "saved"


def expected(directory: Path) -> Tensor:
    return SentenceTransformer(str(directory), device="cpu").encode(INPUTS, convert_to_tensor=True)


def check(directory: Path, *, dim: int = 48) -> None:
    local = from_argument(f"mine={directory}", directory)
    assert (local.spec.context, local.spec.dim) == (POSITIONS, dim)
    model = load_model(local, FLOAT32)
    items = model.prepare(call := Embed(inputs=INPUTS, truncate=True))
    assert items[-1].n_tokens == POSITIONS, "the last position of the table is in use"
    vectors = torch.from_numpy(finish(model, call, items, model.forward(items)).vectors)
    torch.testing.assert_close(vectors, expected(directory), atol=1e-5, rtol=1e-5)
    assert_same_alone(partial(embed, model), INPUTS)


@pytest.mark.parametrize("name", KINDS)
def test_vectors_are_sentence_transformers(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, name)
    path = directory / "1_Pooling" / "config.json"
    for pooling in POOLINGS:
        path.write_text(json.dumps({"word_embedding_dimension": 48, "pooling_mode": pooling}))
        check(directory)


@pytest.mark.parametrize("name", KINDS)
def test_dense_layers_follow_every_encoder(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, name)
    write_dense(directory, [48, 96, 20], bias=False, activation_function=IDENTITY)
    check(directory, dim=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    root = tmp_path_factory.mktemp("pooled")
    directories = (distilbert(root / pooling, pooling=pooling) for pooling in ("max_tokens", "weightedmean_tokens"))
    return [load_model(from_argument(f"mine={directory}", root), FLOAT32) for directory in directories]


@settings(deadline=None, max_examples=25)
@given(inputs=st.lists(st.text(max_size=120), min_size=2, max_size=7))
def test_a_row_alone_equals_the_row_in_any_company(models: list[Model], inputs: list[str]) -> None:
    for model in models:
        assert_same_alone(partial(embed, model), inputs)


def test_poolings_by_their_older_names(tmp_path: Path) -> None:
    directory = write(tmp_path, "distilbert")
    path = directory / "1_Pooling" / "config.json"
    for key in ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens"):
        path.write_text(json.dumps({"word_embedding_dimension": 48, f"pooling_mode_{key}": True}))
        check(directory)
    for several in ({"pooling_mode": ["max", "mean"]}, {f"pooling_mode_{key}_tokens": True for key in ("max", "mean")}):
        path.write_text(json.dumps({"word_embedding_dimension": 48} | several))
        with pytest.raises(CheckpointError, match=r"pooling .* is not served"):
            load_model(from_argument(f"mine={directory}", directory), FLOAT32)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "camembert"])
def test_a_head_that_predicts_tokens_is_not_used(name: str, tmp_path: Path) -> None:
    """all-distilroberta-v1 says that it is a masked language model; a few have the head's tensors, too."""
    directory, kind = write(tmp_path, name), KINDS[name]
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [kind.predictor.__name__]}))
    check(directory)
    whole = kind.predictor.from_pretrained(directory)
    assert getattr(whole, whole.base_model_prefix) is not None
    whole.save_pretrained(directory)
    check(directory)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "t5"])
def test_the_table_of_positions_bounds_a_text_where_nothing_else_does(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, name)
    for file in ("tokenizer_config.json", "sentence_bert_config.json"):
        (directory / file).unlink()
    assert from_argument(f"mine={directory}", directory).spec.context == POSITIONS


def test_the_space_before_a_text_is_the_tokenizers(tmp_path: Path) -> None:
    directory = write(tmp_path, "roberta")
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match="means add_prefix_space False, and"):
        load_model(from_argument(f"mine={directory}", directory), FLOAT32)
    told = directory / "tokenizer_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"add_prefix_space": True}))
    check(directory)
