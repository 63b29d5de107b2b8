"""BERT (Devlin et al., 2018): all-MiniLM-L6-v2 and other encoders of the same architecture."""

from fundament.backbone.bert import ATTENTION, EMBEDDINGS, MLP, load_cross_encoder, load_embedder, read_shape
from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.colbert import ColBERT, is_colbert, load_colbert
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.catalog import ModelSpec

LAYOUT = EMBEDDINGS | ATTENTION | MLP
PREFIXES = ("", "bert.")
MARKERS = ("[unused0]", "[unused1]")


def recognises(config: dict[str, object]) -> bool:
    """BERT proper: JinaBERT and others also call themselves `bert` but have no position table.

    With a masked-language-model head it is an encoder of sparse vectors, which is another family.
    """
    absolute = config.get("position_embedding_type", "absolute") == "absolute"
    return config.get("model_type") == "bert" and absolute and config.get("architectures") != ["BertForMaskedLM"]


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder | ColBERT | CrossEncoder:
    """A sentence encoder, ColBERT or cross-encoder from a BERT checkpoint, in transformers' names.

    They are bare or behind `bert.`.
    """
    shape = read_shape(checkpoint.config)
    if is_colbert(checkpoint.config):
        return load_colbert(checkpoint, spec, placement, shape, LAYOUT, prefixes=PREFIXES, markers=MARKERS)
    if spec.kind == "reranker":
        return load_cross_encoder(checkpoint, spec, placement, shape, LAYOUT, prefixes=PREFIXES)
    return load_embedder(checkpoint, spec, placement, shape, LAYOUT, prefixes=PREFIXES)
