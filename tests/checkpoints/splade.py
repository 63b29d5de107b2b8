"""Masked language models as transformers saves them, and the files that sentence-transformers puts beside them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.checkpoints import byte_bpe, word_piece

POSITIONS = 130
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}


def tokenizer_of(kind: str) -> Tokenizer:
    """WordPiece, with a token that has a dot, or RoBERTa's bytes."""
    if kind == "roberta":
        return byte_bpe()
    tokenizer = word_piece()
    tokenizer.add_tokens(["a.b"])
    return tokenizer


def splade(directory: Path, kind: str, *, tied: bool = True, n_positions: int = POSITIONS) -> PreTrainedModel:
    """Save a random masked language model and its tokenizer; the model is the reference.

    Args:
        directory: where it goes.
        kind: `bert`, `distilbert` or `roberta`.
        n_positions: rows of the table of positions.
        tied: leave the vocabulary's matrix out, as it is the table of tokens.
    """
    tokenizer = tokenizer_of(kind)
    config: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "tie_word_embeddings": tied}
    config["max_position_embeddings"] = n_positions
    generator = torch.Generator().manual_seed(3)
    model: PreTrainedModel
    match kind:
        case "bert":
            model = BertForMaskedLM(BertConfig(**_SIZES, **config))
        case "distilbert":
            sizes = {"dim": 48, "hidden_dim": 40, "n_layers": 2, "n_heads": 6}
            model = DistilBertForMaskedLM(DistilBertConfig(**sizes, **config))
        case _:
            model = RobertaForMaskedLM(RobertaConfig(**_SIZES, **config, pad_token_id=1, type_vocab_size=1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.3
            one = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(scale * numbers + float(one))
    directory.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return model


def with_idf(directory: Path, weights: dict[str, float]) -> Path:
    """Put the weights of queries beside a model."""
    (directory / "idf.json").write_text(json.dumps(weights))
    return directory
