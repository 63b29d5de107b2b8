"""Qwen2 and Qwen3 as text embedders: Qwen3-Embedding, jina-code-embeddings, jina-embeddings-v5-text-small.

Qwen2 has biases on queries, keys and values; Qwen3 normalises queries and keys per head instead.
"""

from dataclasses import replace
from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.llama import last_token, load_embedder, read_shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError


def recognises(config: dict[str, Any]) -> bool:
    """Qwen2, Qwen3, and the causal one of the two v5 text models; not a listwise reranker on top of one."""
    if config.get("model_type") == "jina_embeddings_v5":
        return config.get("is_decoder") is not False
    return config.get("model_type") in ("qwen2", "qwen3") and "JinaForRanking" not in config.get("architectures", ())


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder:
    """An embedder from a Qwen checkpoint in transformers' names."""
    config = checkpoint.config
    shape = replace(read_shape(config), causal=True, window=read_window(config))
    shape = replace(shape, qkv_bias=True) if config["model_type"] == "qwen2" else replace(shape, qk_norm="head")
    return load_embedder(checkpoint, spec, placement, shape, last_token(checkpoint))


def read_window(config: dict[str, Any]) -> tuple[int | None, ...]:
    """How many tokens each layer's tokens see; None means all before them.

    Raises:
        CheckpointError: layers of an unknown type, or windows without a size.
    """
    n_layers = config["num_hidden_layers"]
    size = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config["max_window_layers"] if size else n_layers
        types = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    sizes = {"full_attention": None, "sliding_attention": size}
    if len(types) != n_layers or not sizes.keys() >= set(types):
        raise CheckpointError(
            f"config.json: layer_types should name {sorted(sizes)} for {n_layers} layers, not {types}"
        )
    if "sliding_attention" in types and not size:
        raise CheckpointError(
            "config.json: layer_types has sliding_attention, but use_sliding_window and sliding_window give no size"
        )
    return tuple(sizes[kind] for kind in types)
