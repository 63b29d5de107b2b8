"""T5 in the names of its published checkpoints."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.checkpoints import random_tensors, save, unigram


def sentence_piece() -> Tokenizer:
    """T5's tokenizer: `… </s>`, nothing before the text."""
    return unigram(("<pad>", "</s>", "<unk>"), "$A </s>", "$A </s> $B </s>")


def t5(
    directory: Path,
    *,
    gated: bool = False,
    names: tuple[str, ...] = ("shared",),
    decoder: bool = False,
    **config: Any,
) -> Path:
    """A sentence encoder like jina-embedding-b-en-v1.

    Args:
        directory: where it goes.
        gated: T5 1.1's MLP.
        names: what the token embeddings are called, all holding the same numbers.
        decoder: a whole T5, with tensors that only write text.
        config: keys of `config.json` that differ.
    """
    tokenizer = sentence_piece()
    hidden, inner, n_heads, head_dim, n_layers, vocab = 48, 40, 4, 16, 2, tokenizer.get_vocab_size()
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (vocab, hidden),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, n_heads),
        "encoder.final_layer_norm.weight": (hidden,),
    }
    for i in range(n_layers):
        layer = f"encoder.block.{i}.layer"
        shapes |= {f"{layer}.0.SelfAttention.{part}.weight": (n_heads * head_dim, hidden) for part in "qkv"}
        shapes[f"{layer}.0.SelfAttention.o.weight"] = (hidden, n_heads * head_dim)
        shapes |= {f"{layer}.{part}.layer_norm.weight": (hidden,) for part in (0, 1)}
        ups = ("wi_0", "wi_1") if gated else ("wi",)
        shapes |= {f"{layer}.1.DenseReluDense.{part}.weight": (inner, hidden) for part in ups}
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (hidden, inner)
    if decoder:
        shapes["decoder.block.0.layer.0.SelfAttention.q.weight"] = (n_heads * head_dim, hidden)
        shapes["lm_head.weight"] = (vocab, hidden)
    published = {
        "architectures": ["T5ForConditionalGeneration" if decoder else "T5EncoderModel"],
        "model_type": "t5",
        "d_ff": inner,
        "d_kv": head_dim,
        "d_model": hidden,
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "n_positions": 512,
        "num_heads": n_heads,
        "num_layers": n_layers,
        "pad_token_id": 0,
        "relative_attention_num_buckets": 32,
        "vocab_size": vocab,
    }
    tensors = random_tensors(shapes)
    # Scores are not scaled, so the products of random numbers are kept as small as trained ones.
    for name in list(tensors):
        if name.endswith(("SelfAttention.q.weight", "SelfAttention.k.weight")):
            tensors[name] = tensors[name] / head_dim**0.25
    tokens = tensors.pop("shared.weight")
    tensors |= {f"{name}.weight": tokens.clone() for name in names}
    return save(directory, published | config, tensors, tokenizer, pooling="mean_tokens")
