"""Cross-encoders as they are published: an encoder behind its prefix, and a head of one label."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EuroBertConfig,
    EuroBertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.checkpoints import byte_bpe, llama, random_tensors, resave, save, word_piece
from tests.checkpoints.jina_bert import jina_bert
from tests.checkpoints.xlm_roberta import HIDDEN, Names, xlm_roberta

HEADS: dict[str, dict[str, tuple[int, ...]]] = {
    "bert": {"classifier.weight": (1, HIDDEN), "classifier.bias": (1,)},
    "roberta": {
        "classifier.dense.weight": (HIDDEN, HIDDEN),
        "classifier.dense.bias": (HIDDEN,),
        "classifier.out_proj.weight": (1, HIDDEN),
        "classifier.out_proj.bias": (1,),
    },
}


def bert_ranker(directory: Path, *, n_labels: int = 1, n_positions: int = 130, **config: Any) -> Path:
    """A cross-encoder like those of MS MARCO: BERT, whose second text has tokens of type 1."""
    tokenizer = word_piece()
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40}
    published = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=n_positions,
        num_labels=n_labels,
        architectures=["BertForSequenceClassification"],
        **sizes,
    )
    shapes = {name: tuple(t.shape) for name, t in BertForSequenceClassification(published).state_dict().items()}
    return save(directory, published.to_dict() | config, random_tensors(shapes), tokenizer)


CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertForSequenceClassification),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification),
    "eurobert": (EuroBertConfig, EuroBertForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def classifier(directory: Path, kind: str, tokenizer: Tokenizer, **config: Any) -> Path:
    """One of transformers' sequence classifiers with one label."""
    its_config, its_class = CLASSES[kind]
    architectures = [its_class.__name__]
    published = its_config(
        vocab_size=tokenizer.get_vocab_size(), num_labels=1, architectures=architectures, dtype="float32", **config
    )
    shapes = {name: tuple(t.shape) for name, t in its_class(published).state_dict().items()}
    return save(directory, published.to_dict(), random_tensors(shapes), tokenizer)


def distilbert_ranker(directory: Path) -> Path:
    """A cross-encoder on DistilBERT, whose tokens have no types."""
    sizes = {"dim": HIDDEN, "n_heads": 6, "n_layers": 2, "hidden_dim": 40}
    return classifier(directory, "distilbert", word_piece(), max_position_embeddings=130, **sizes)


def roberta_ranker(directory: Path) -> Path:
    """A cross-encoder like those of STS benchmark: RoBERTa, whose tokenizer reads bytes."""
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40}
    table = {"max_position_embeddings": 130, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return classifier(directory, "roberta", byte_bpe(), **sizes, **table)


def llama_ranker(directory: Path, kind: str, *, pair: str | None = f"$A $B {llama.END}", **config: Any) -> Path:
    """A cross-encoder on EuroBERT or Qwen, whose padding token is the one that ends a pair."""
    tokenizer = llama.tokenizer(ends=False)
    end = tokenizer.token_to_id(llama.END)
    if pair:
        special = [(llama.END, end)]
        tokenizer.post_processor = TemplateProcessing(single="$A", pair=pair, special_tokens=special)
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    usual = {"intermediate_size": 40, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": end}
    if kind == "eurobert":
        usual |= dict.fromkeys(("bos_token_id", "eos_token_id", "mask_token_id"), end)
    return classifier(directory, kind, tokenizer, **sizes | usual | config)


def jina_bert_ranker(directory: Path, **options: Any) -> Path:
    """jina-reranker-v1: JinaBERT with a tokenizer of bytes, BERT's head, and no word of labels in its config."""
    jina_bert(directory, prefix="bert.", tokenizer=byte_bpe(), architectures=["JinaBertModel"], **options)
    return resave(directory, **random_tensors(HEADS["bert"], seed=1))


def xlm_roberta_ranker(
    directory: Path, *, names: Names = "stock", tokenizer: Tokenizer | None = None, **config: Any
) -> Path:
    """bge-reranker-v2-m3 (`stock`), or jina-reranker-v2 (`flash`), whose config names no model type."""
    architectures = ["XLMRobertaForSequenceClassification"]
    xlm_roberta(
        directory,
        names=names,
        prefix="roberta.",
        pooling=None,
        tokenizer=tokenizer,
        architectures=architectures,
        num_labels=1,
        **config,
    )
    tensors = load_file(directory / "model.safetensors") | random_tensors(HEADS["roberta"], seed=1)
    save_file({name: t for name, t in tensors.items() if "pooler" not in name}, directory / "model.safetensors")
    if names == "flash":
        path = directory / "config.json"
        told = json.loads(path.read_text())
        del told["model_type"], told["hidden_act"]
        path.write_text(json.dumps(told))
    return directory
