"""DistilBERT (Sanh et al., 2019): BERT without types of tokens, as a sentence encoder or a cross-encoder."""

from typing import Any

from fundament.backbone.bert import DISTILBERT, load_cross_encoder, load_embedder, read_distilbert_shape
from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.classifier_head import DISTILBERT_HEAD
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.catalog import ModelSpec

PREFIXES = ("", "distilbert.")


def recognises(config: dict[str, Any]) -> bool:
    """DistilBERT; with a masked-language-model head it is an encoder of sparse vectors, which is another family."""
    return config.get("model_type") == "distilbert" and config.get("architectures") != ["DistilBertForMaskedLM"]


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder | CrossEncoder:
    """A sentence encoder or cross-encoder from a DistilBERT checkpoint in transformers' names.

    They are bare or behind `distilbert.`.
    """
    shape = read_distilbert_shape(checkpoint.config)
    if spec.kind == "reranker":
        return load_cross_encoder(
            checkpoint, spec, placement, shape, DISTILBERT, prefixes=PREFIXES, kind=DISTILBERT_HEAD
        )
    return load_embedder(checkpoint, spec, placement, shape, DISTILBERT, prefixes=PREFIXES)
