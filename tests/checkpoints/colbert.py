"""ColBERT models as they are published: a backbone behind its prefix, `linear.weight`, metadata."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import BertConfig, BertModel

from tests.checkpoints import random_tensors, resave, save, unigram, word_piece
from tests.checkpoints.jina_bert import jina_bert
from tests.checkpoints.xlm_roberta import HIDDEN, xlm_roberta

DIM = 12
MARKS = [",", ".", "?", "-"]


def _with_marks(tokenizer: Tokenizer, *markers: str) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return tokenizer


def _finish(directory: Path, metadata: dict[str, Any] | None, dim: int = DIM) -> Path:
    resave(directory, **random_tensors({"linear.weight": (dim, HIDDEN)}, seed=1))
    if metadata is not None:
        (directory / "artifact.metadata").write_text(json.dumps(metadata))
    return directory


METADATA = {
    "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]",
    "query_token": "[Q]",
    "doc_token": "[D]",
    "query_maxlen": 32,
    "doc_maxlen": 300,
    "attend_to_mask_tokens": False,
    "mask_punctuation": True,
    "dim": DIM,
    "similarity": "cosine",
}


def colbert_v1(directory: Path, **metadata: Any) -> Path:
    """JinaBERT behind `bert.`; `metadata` are keys of `artifact.metadata` that differ."""
    tokenizer = _with_marks(word_piece(), "[unused0]", "[unused1]")
    jina_bert(directory, prefix="bert.", tokenizer=tokenizer, architectures=["HF_ColBERT"])
    return _finish(directory, METADATA | metadata)


def bert_colbert(directory: Path) -> Path:
    """BERT behind `bert.`, like colbertv2.0: one that transformers has a class for."""
    tokenizer = _with_marks(word_piece(), "[unused0]", "[unused1]")
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_attention_heads=6,
        num_hidden_layers=2,
        intermediate_size=40,
        architectures=["HF_ColBERT"],
    )
    shapes = {f"bert.{name}": tuple(tensor.shape) for name, tensor in BertModel(config).state_dict().items()}
    save(directory, config.to_dict(), random_tensors(shapes), tokenizer)
    return _finish(directory, METADATA)


def colbert_v2(directory: Path, metadata: dict[str, Any] | None = None, *, dim: int = DIM) -> Path:
    """XLM-RoBERTa with rotations in the flash names behind `roberta.`."""
    tokenizer = _with_marks(unigram(), "[QueryMarker]", "[DocumentMarker]")
    xlm_roberta(
        directory,
        names="flash",
        positions="rotary",
        prefix="roberta.",
        pooling=None,
        tokenizer=tokenizer,
        architectures=["HF_ColBERT"],
        max_position_embeddings=8194,
        rotary_emb_base=10000.0,
    )
    return _finish(directory, metadata, dim)
