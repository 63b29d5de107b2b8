"""DistilBERT (Sanh et al., 2019) with a classifier of one label: cross-encoders, whose pairs have no types."""

from typing import Any

from fundament.backbone.bert import DISTILBERT, load_cross_encoder, read_distilbert_shape
from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.cross_encoder import DISTILBERT_HEAD, CrossEncoder
from fundament.backbone.device import Placement
from fundament.catalog import ModelSpec

PREFIXES = ("distilbert.",)


def recognises(config: dict[str, Any]) -> bool:
    """DistilBERT's sequence classifiers; with a masked language model's head it is another family."""
    classifier = config.get("architectures") == ["DistilBertForSequenceClassification"]
    return config.get("model_type") == "distilbert" and classifier


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> CrossEncoder:
    """A cross-encoder from a DistilBERT checkpoint in transformers' names."""
    shape = read_distilbert_shape(checkpoint.config)
    return load_cross_encoder(checkpoint, spec, placement, shape, DISTILBERT, prefixes=PREFIXES, kind=DISTILBERT_HEAD)
