"""Qwen2 and Qwen3: Qwen3-Embedding, jina-code-embeddings, jina-embeddings-v5-text-small, and Qwen3-Reranker.

An embedder and a reranker of this family have the same names and config; the catalogue's entry says which it is. A
sequence classifier of one label, which the catalogue has none of, is a cross-encoder. The catalogue's embedders pool
the last token; one of one's own pools as its files say: KaLM-embedding takes the mean.
"""

from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.cross_encoder import CAUSAL_HEAD, CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.generative import GenerativeReranker, load_generative
from fundament.backbone.llama import last_token, load_cross_encoder, load_embedder, read_qwen_shape
from fundament.backbone.pooling import Pooling
from fundament.backbone.sentence import read_pooling
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError


def recognises(config: dict[str, Any]) -> bool:
    """Qwen2, Qwen3, and the causal one of the two v5 text models; not a listwise reranker on top of one."""
    if config.get("model_type") == "jina_embeddings_v5":
        return config.get("is_decoder") is not False
    return config.get("model_type") in ("qwen2", "qwen3") and "JinaForRanking" not in (
        config.get("architectures") or ()
    )


def load(
    checkpoint: Checkpoint, spec: ModelSpec, placement: Placement
) -> TextEmbedder | GenerativeReranker | CrossEncoder:
    """An embedder, or where the spec says so a reranker, from a Qwen checkpoint in transformers' names."""
    config, shape = checkpoint.config, read_qwen_shape(checkpoint.config)
    classifies = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if spec.kind == "reranker" and classifies and not spec.repo:
        padding = config.get("pad_token_id")
        return load_cross_encoder(checkpoint, spec, placement, shape, CAUSAL_HEAD, padding=padding)
    if spec.kind == "reranker":
        return load_generative(checkpoint, spec, placement, shape)
    return load_embedder(checkpoint, spec, placement, shape, read_own_pooling(checkpoint, spec))


def read_own_pooling(checkpoint: Checkpoint, spec: ModelSpec) -> Pooling:
    """The last token, or what a directory of one's own says.

    Raises:
        CheckpointError: a pooling that is not served, or one of all tokens behind code that may attend both ways.
    """
    if spec.repo or checkpoint.config["model_type"] == "jina_embeddings_v5":
        return last_token(checkpoint)
    pooling = read_pooling(checkpoint, "last")
    # Models that pool all tokens often come with code that lets tokens see those behind them.
    if pooling != "last" and checkpoint.config.get("auto_map") and not checkpoint.config.get("is_causal"):
        raise CheckpointError(
            f"{checkpoint.directory} pools '{pooling}' behind code of its own, auto_map in config.json, which is not "
            'run; if attention there is to earlier tokens alone, say so in config.json: "is_causal": true'
        )
    return pooling
