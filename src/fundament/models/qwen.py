"""Qwen2 and Qwen3: Qwen3-Embedding, jina-code-embeddings, jina-embeddings-v5-text-small, and Qwen3-Reranker.

An embedder and a reranker of this family have the same names and config; the catalogue's entry says which it is. A
sequence classifier of one label, which the catalogue has none of, is a cross-encoder. The catalogue's embedders pool
the last token; one of one's own pools as its files say: KaLM-embedding takes the mean.
"""

from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.classifier_head import CAUSAL_HEAD
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.decoder import PREFIX_BYTES
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.generative import GenerativeReranker, load_generative
from fundament.backbone.llama import last_token, load_cross_encoder, load_embedder, read_qwen_shape
from fundament.backbone.pooling import Pooling
from fundament.backbone.sentence import is_pooled, read_pooling
from fundament.catalog import CATALOG, ModelSpec
from fundament.errors import CheckpointError

_POOLING = "1_Pooling/config.json"


def recognises(config: dict[str, Any]) -> bool:
    """Qwen2, Qwen3, and the causal one of the two v5 text models; not a listwise reranker on top of one."""
    if config.get("model_type") == "jina_embeddings_v5":
        return config.get("is_decoder") is not False
    return config.get("model_type") in ("qwen2", "qwen3") and "JinaForRanking" not in (
        config.get("architectures") or ()
    )


def kept_bytes(spec: ModelSpec) -> int:
    """Keys and values of the beginnings of a reranker's prompts."""
    return PREFIX_BYTES if spec.kind == "reranker" else 0


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
    """The last token, or what a directory of one's own says, which must say something.

    Raises:
        CheckpointError: a pooling that is not served, or none, as where a reranker or a model that writes lies.
    """
    if spec.repo or checkpoint.config["model_type"] == "jina_embeddings_v5":
        return last_token(checkpoint)
    told = is_pooled(checkpoint) or checkpoint.json(_POOLING, default={})
    if not (told or checkpoint.config.get("emb_pooler")):
        rankers = [spec.id for spec in CATALOG.values() if (spec.family, spec.kind) == ("qwen", "reranker")]
        served = " or ".join(f"--model {ranker}={checkpoint.directory}" for ranker in rankers)
        raise CheckpointError(
            f"{checkpoint.directory} has no {_POOLING}, so nothing says that it makes vectors: rerankers and models "
            'that write look alike. If it makes them, write one that says {"pooling_mode": "lasttoken"}. '
            f"If it is Qwen3-Reranker: {served}. Other rerankers that answer yes or no are not served"
        )
    return read_pooling(checkpoint, "last")
