"""JinaBERT (Günther et al., 2023): jina-embeddings-v2 in five languages and its small one, jina-reranker-v1.

BERT with ALiBi in place of a position table. The public checkpoints differ in three more things, which their tensor
names tell and their configs do not: whether queries and keys are normalised, whether attention has a second residual
sum, and how the MLP is made. So the names decide; `config.json` must not contradict them.
"""

from dataclasses import replace

import torch

from fundament.backbone.bert import ATTENTION, EMBEDDINGS, UNUSED, load_cross_encoder, load_embedder, read_shape
from fundament.backbone.checkpoint import Checkpoint, Part, Source
from fundament.backbone.colbert import ColBERT, is_colbert, load_colbert
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import Activation
from fundament.backbone.transformer import Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

QK_NORM: dict[str, Source] = {
    "layers.{i}.q_norm": "encoder.layer.{i}.attention.self.layer_norm_q",
    "layers.{i}.k_norm": "encoder.layer.{i}.attention.self.layer_norm_k",
}

# The first half of `gated_layers` is the gate, of `up_gated_layer` it is the second.
MLPS: dict[str, dict[str, Source]] = {
    "gated_layers": {
        "layers.{i}.gate": Part("encoder.layer.{i}.mlp.gated_layers", 0, 2),
        "layers.{i}.up": Part("encoder.layer.{i}.mlp.gated_layers", 1, 2),
        "layers.{i}.down": "encoder.layer.{i}.mlp.wo",
    },
    "up_gated_layer": {
        "layers.{i}.gate": Part("encoder.layer.{i}.mlp.up_gated_layer", 1, 2),
        "layers.{i}.up": Part("encoder.layer.{i}.mlp.up_gated_layer", 0, 2),
        "layers.{i}.down": "encoder.layer.{i}.mlp.down_layer",
    },
    "up_layer": {
        "layers.{i}.up": "encoder.layer.{i}.mlp.up_layer",
        "layers.{i}.down": "encoder.layer.{i}.mlp.down_layer",
    },
}

PREFIXES = ("", "bert.")
MARKERS = ("[unused0]", "[unused1]")  # before queries and documents of jina-colbert-v1-en

GATES: dict[str, Activation] = {"geglu": "gelu", "reglu": "relu"}


def recognises(config: dict[str, object]) -> bool:
    """JinaBERT calls itself `bert`; only ALiBi tells it from BERT."""
    return config.get("model_type") == "bert" and config.get("position_embedding_type") == "alibi"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder | ColBERT | CrossEncoder:
    """A sentence encoder, ColBERT or cross-encoder from a JinaBERT checkpoint, its names bare or behind `bert.`.

    Raises:
        CheckpointError: the checkpoint does not fit, its config contradicts its tensors, or float16 is asked for.
    """
    if placement.states == torch.float16:
        raise CheckpointError(f"{spec.id} overflows in float16, as ALiBi models do; use --dtype bfloat16 or float32")
    shape, layout = read_layout(checkpoint)
    if is_colbert(checkpoint.config):
        return load_colbert(checkpoint, spec, placement, shape, layout, prefixes=PREFIXES, markers=MARKERS)
    if spec.kind == "reranker":
        return load_cross_encoder(checkpoint, spec, placement, shape, layout, prefixes=PREFIXES)
    return load_embedder(
        checkpoint,
        spec,
        placement,
        shape,
        layout,
        prefixes=PREFIXES,
        # The published configs name a masked language model; its head predicts tokens and has no part in embeddings.
        unused=rf"{UNUSED}|cls\.predictions\..*",
    )


def read_layout(checkpoint: Checkpoint) -> tuple[Shape, dict[str, Source]]:
    """What a checkpoint's tensors are and what transformer they make.

    Raises:
        CheckpointError: an MLP that is none of the three, or another than `feed_forward_type` says.
    """
    config, first = checkpoint.config, "encoder.layer.0"
    mlp = next((name for name in MLPS if checkpoint.has(f"{first}.mlp.{name}.weight")), None)
    if mlp is None:
        raise CheckpointError(f"{checkpoint.directory} is not JinaBERT: {first}.mlp has none of {', '.join(MLPS)}")
    gated, kind = mlp != "up_layer", config["feed_forward_type"]
    if gated != (kind in GATES):
        raise CheckpointError(
            f"{checkpoint.directory}: feed_forward_type '{kind}' does not go with the tensors {first}.mlp.{mlp}; "
            f"gated MLPs are {', '.join(GATES)}"
        )
    qk_norm = checkpoint.has(f"{first}.attention.self.layer_norm_q.weight")
    inner_residual = checkpoint.has(f"{first}.layer_norm_1.weight")
    inside = checkpoint.has(f"{first}.mlp.layernorm.weight")
    plain = read_shape(config)
    shape = replace(
        plain,
        positions="alibi",
        qk_norm="all" if qk_norm else None,
        gated=gated,
        activation=GATES[kind] if gated else plain.activation,
        up_bias=False,
        inner_residual=inner_residual,
    )
    layout = EMBEDDINGS | ATTENTION | QK_NORM | MLPS[mlp]
    layout["layers.{i}.inner_norm"] = "encoder.layer.{i}.layer_norm_1"
    layout["layers.{i}.mlp_norm"] = "encoder.layer.{i}." + ("mlp.layernorm" if inside else "layer_norm_2")
    return shape, layout
