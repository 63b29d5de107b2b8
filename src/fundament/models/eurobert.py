"""EuroBERT (Boizard et al., 2025), a bidirectional encoder of Llama's make: jina-embeddings-v5-text-nano."""

from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.llama import last_token, load_embedder, read_shape
from fundament.backbone.sentence import read_pooling
from fundament.catalog import ModelSpec


def recognises(config: dict[str, Any]) -> bool:
    """EuroBERT, and the one of the two v5 text models that is no decoder."""
    if config.get("model_type") == "jina_embeddings_v5":
        return config.get("is_decoder") is False
    return config.get("model_type") == "eurobert"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder:
    """An embedder from a EuroBERT checkpoint in transformers' names. The v5 model pools the last token."""
    config = checkpoint.config
    pooling = last_token(checkpoint) if config["model_type"] == "jina_embeddings_v5" else read_pooling(checkpoint, None)
    return load_embedder(checkpoint, spec, placement, read_shape(config), pooling)
