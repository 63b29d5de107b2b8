"""MPNet in the names of its published checkpoints."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from tests.checkpoints import random_tensors, save, word_piece


def word_piece_of_mpnet() -> Tokenizer:
    """BERT's pieces between RoBERTa's marks, `<s> … </s>`."""
    tokenizer = word_piece(("<s>", "<pad>", "</s>", "[UNK]", "<mask>"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def mpnet(directory: Path, *, prefix: str = "", **config: Any) -> Path:
    """A sentence encoder like all-mpnet-base-v2.

    Args:
        directory: where it goes.
        prefix: before every tensor name: nothing or `mpnet.`.
        config: keys of `config.json` that differ.
    """
    tokenizer = word_piece_of_mpnet()
    hidden, inner, n_heads, n_layers, n_positions, vocab = 48, 40, 4, 2, 402, tokenizer.get_vocab_size()
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.position_embeddings.weight": (n_positions, hidden),
        "encoder.relative_attention_bias.weight": (32, n_heads),
    }

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})

    def linear(name: str, n_out: int, n_in: int) -> None:
        shapes.update({f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)})

    norm("embeddings.LayerNorm")
    for i in range(n_layers):
        layer = f"encoder.layer.{i}"
        for part in "qkvo":
            linear(f"{layer}.attention.attn.{part}", hidden, hidden)
        norm(f"{layer}.attention.LayerNorm")
        linear(f"{layer}.intermediate.dense", inner, hidden)
        linear(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    linear("pooler.dense", hidden, hidden)
    published = {
        "architectures": ["MPNetForMaskedLM"],
        "model_type": "mpnet",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": n_positions,
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "relative_attention_num_buckets": 32,
        "vocab_size": vocab,
    }
    tensors = {f"{prefix}{name}": tensor for name, tensor in random_tensors(shapes).items()}
    return save(directory, published | config, tensors, tokenizer, pooling="mean_tokens")
