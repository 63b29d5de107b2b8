"""EuroBERT (Boizard et al., 2025), a bidirectional encoder of Llama's make: jina-embeddings-v5-text-nano.

With a classifier of one label it is a cross-encoder.
"""

from dataclasses import replace
from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.classifier_head import HeadKind
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.llama import last_token, load_cross_encoder, load_embedder, read_shape
from fundament.backbone.sentence import read_pooling
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

_HEAD = HeadKind(out="classifier", dense="dense", activation="gelu")
HEADS = {  # `classifier_pooling` → what the classifier pools
    "bos": _HEAD,
    "mean": replace(_HEAD, pooling="mean"),
    "late": replace(_HEAD, pooling="mean", late=True),
}


def recognises(config: dict[str, Any]) -> bool:
    """EuroBERT, and the one of the two v5 text models that is no decoder."""
    if config.get("model_type") == "jina_embeddings_v5":
        return config.get("is_decoder") is False
    return config.get("model_type") == "eurobert"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder | CrossEncoder:
    """An embedder, whose v5 model pools the last token, or a cross-encoder, from a checkpoint in transformers' names.

    Raises:
        CheckpointError: the checkpoint does not fit, or pools in a way that is not served.
    """
    config = checkpoint.config
    if spec.kind == "reranker":
        # The second is what the publisher's own code calls it; `late` is what both do where it is left out.
        told = config.get("classifier_pooling", config.get("clf_pooling", "late"))
        if told not in HEADS:
            raise CheckpointError(f"config.json says classifier_pooling '{told}'; known are {', '.join(HEADS)}")
        if config.get("clf_pooling", told) != told:
            raise CheckpointError(f"config.json says classifier_pooling '{told}' and clf_pooling; take one away")
        return load_cross_encoder(checkpoint, spec, placement, read_shape(config), HEADS[told])
    pooling = last_token(checkpoint) if config["model_type"] == "jina_embeddings_v5" else read_pooling(checkpoint, None)
    return load_embedder(checkpoint, spec, placement, read_shape(config), pooling)
