"""Cross-encoders as they are published: an encoder behind its prefix, and a head of one label."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertForSequenceClassification

from tests.checkpoints import byte_bpe, random_tensors, resave, save, word_piece
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
