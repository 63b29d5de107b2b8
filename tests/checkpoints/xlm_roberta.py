"""XLM-RoBERTa in the three sets of tensor names that it is published under."""

from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from torch import Tensor

from tests.checkpoints import random_tensors, save, unigram

HIDDEN, INNER, LAYERS, HEADS, POSITIONS = 48, 40, 2, 6, 130

Names = Literal["stock", "flash", "port"]

_FLASH_TO_STOCK = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers.": "encoder.layer.",
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_FLASH_TO_PORT = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers.": "layers.",
    "mixer.out_proj": "self_attn.o_proj",
    "norm1": "post_attention_layernorm",
    "norm2": "post_mlp_layernorm",
}


def flash_tensors(vocab: int, *, table: bool) -> dict[str, Tensor]:
    """Random weights in the names of the flash layout, with or without a table of positions."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, HIDDEN),
        "embeddings.token_type_embeddings.weight": (1, HIDDEN),
        "emb_ln.weight": (HIDDEN,),
        "emb_ln.bias": (HIDDEN,),
        "pooler.dense.weight": (HIDDEN, HIDDEN),
        "pooler.dense.bias": (HIDDEN,),
    }
    if table:
        shapes["embeddings.position_embeddings.weight"] = (POSITIONS, HIDDEN)
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        for name, n_out, n_in in (
            ("mixer.Wqkv", 3 * HIDDEN, HIDDEN),
            ("mixer.out_proj", HIDDEN, HIDDEN),
            ("mlp.fc1", INNER, HIDDEN),
            ("mlp.fc2", HIDDEN, INNER),
        ):
            shapes |= {f"{layer}.{name}.weight": (n_out, n_in), f"{layer}.{name}.bias": (n_out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"{layer}.{name}.weight": (HIDDEN,), f"{layer}.{name}.bias": (HIDDEN,)}
    return random_tensors(shapes)


def renamed(tensors: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Weights of the flash layout in other names, the fused projection taken apart."""
    if names == "flash":
        return tensors
    table = _FLASH_TO_STOCK if names == "stock" else _FLASH_TO_PORT
    parts = ("attention.self.{}", ("query", "key", "value")) if names == "stock" else ("self_attn.{}_proj", "qkv")
    found = {}
    for name, tensor in tensors.items():
        new = name
        for old, other in table.items():
            new = new.replace(old, other)
        if "mixer.Wqkv" in new:
            pattern, letters = parts
            for part, letter in zip(tensor.chunk(3), letters, strict=True):
                found[new.replace("mixer.Wqkv", pattern.format(letter))] = part.contiguous()
        else:
            found[new] = tensor
    return found


def xlm_roberta(
    directory: Path,
    *,
    names: Names = "stock",
    positions: Literal["absolute", "rotary"] = "absolute",
    prefix: str = "",
    pooling: str | None = "cls_token",
    pickled: bool = False,
    tokenizer: Tokenizer | None = None,
    **config: Any,
) -> Path:
    """A sentence encoder like bge-m3 (`stock`, absolute) or jina-embeddings-v3 (`flash` and `port`, rotary).

    Args:
        directory: where it goes.
        names: which of the three sets of tensor names.
        positions: a table, or rotations.
        prefix: before every tensor name: nothing or `roberta.`.
        pooling: what `1_Pooling/config.json` says; None for no such file.
        pickled: write `pytorch_model.bin` in place of safetensors, as bge-m3 has it.
        tokenizer: another than SentencePiece's pieces alone.
        config: keys of `config.json` that differ.
    """
    tokenizer = tokenizer or unigram()
    vocab = tokenizer.get_vocab_size()
    published: dict[str, Any] = {
        "architectures": ["XLMRobertaModel"],
        "model_type": "xlm-roberta",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "gelu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": POSITIONS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "type_vocab_size": 1,
        "vocab_size": vocab,
    }
    if names == "port":
        published |= {
            "architectures": ["JinaEmbeddingsV3Model"],
            "model_type": "jina_embeddings_v3",
            "rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"},
        }
    else:
        published["position_embedding_type"] = positions
    if positions == "rotary" and names == "flash":
        published |= {"rotary_emb_base": 20000.0, "use_flash_attn": True, "emb_pooler": None}
    tensors = renamed(flash_tensors(vocab, table=positions == "absolute"), names)
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    return save(directory, published | config, tensors, tokenizer, pooling=pooling, pickled=pickled)
