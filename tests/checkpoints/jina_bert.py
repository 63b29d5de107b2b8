"""JinaBERT in the names of its published checkpoints."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.checkpoints import byte_bpe, random_tensors, save, word_piece


def jina_bert(
    directory: Path,
    *,
    mlp: str = "gated_layers",
    qk_norm: bool = False,
    inner_residual: bool = False,
    n_heads: int = 12,
    prefix: str = "",
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Path:
    """A sentence encoder like jina-embeddings-v2.

    Args:
        directory: where it goes.
        mlp: `gated_layers` as in the English model, `up_gated_layer` as in the code model, or `up_layer`, not gated.
        qk_norm: normalise queries and keys, as in the code model.
        inner_residual: the second residual sum, as in the code model.
        n_heads: of the attention.
        prefix: before every tensor name: nothing or `bert.`.
        tokenizer: another than that of the kind of MLP.
        config: keys of `config.json` that differ.
    """
    if tokenizer is None:
        tokenizer = word_piece() if mlp == "gated_layers" else byte_bpe()
    hidden, inner, vocab, n_layers = 48, 40, tokenizer.get_vocab_size(), 2
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)})

    def linear(name: str, n_out: int, n_in: int, *, bias: bool = True) -> None:
        shapes.update({f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if bias else {}))

    norm("embeddings.LayerNorm")
    for i in range(n_layers):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", hidden, hidden)
        if qk_norm:
            norm(f"{layer}.attention.self.layer_norm_q")
            norm(f"{layer}.attention.self.layer_norm_k")
        linear(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        if inner_residual:
            norm(f"{layer}.layer_norm_1")
        linear(f"{layer}.mlp.{mlp}", inner if mlp == "up_layer" else 2 * inner, hidden, bias=False)
        linear(f"{layer}.mlp.{'wo' if mlp == 'gated_layers' else 'down_layer'}", hidden, inner)
        norm(f"{layer}.mlp.layernorm" if mlp == "gated_layers" else f"{layer}.layer_norm_2")
    published = {
        "architectures": ["JinaBertForMaskedLM"],
        "model_type": "bert",
        "position_embedding_type": "alibi",
        "feed_forward_type": "original" if mlp == "up_layer" else "geglu",
        "emb_pooler": "mean",
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 8192,
        "model_max_length": 8192,
        "num_attention_heads": n_heads,
        "num_hidden_layers": n_layers,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": vocab,
    }
    tensors = {f"{prefix}{name}": tensor for name, tensor in random_tensors(shapes).items()}
    return save(directory, published | config, tensors, tokenizer)
