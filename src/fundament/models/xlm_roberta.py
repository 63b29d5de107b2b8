"""XLM-RoBERTa (Conneau et al., 2020): bge-m3, with rotary positions jina-embeddings-v3 and jina-colbert-v2, rerankers.

RoBERTa (Liu et al., 2019) and CamemBERT (Martin et al., 2020) differ in their tokenizers and weights alone. The same
post-norm encoder is published under three sets of tensor names. The names decide the layout, `config.json` the
positions. jina-embeddings-v3 has five adapters, in its weights or in folders beside them; without a task none is used.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fundament.backbone.adapters import (
    WOVEN,
    Adapters,
    adapters_of,
    is_woven,
    read_foldered,
    read_woven,
    woven_layout,
)
from fundament.backbone.bert import (
    ATTENTION,
    EMBEDDINGS,
    FLASH,
    MLP,
    UNUSED,
    load_cross_encoder,
    load_embedder,
    read_shape,
)
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.colbert import ColBERT, is_colbert, load_colbert
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.token_heads import HeadedEmbedder, read_heads
from fundament.backbone.transformer import Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

STOCK = EMBEDDINGS | ATTENTION | MLP

PORT: dict[str, Source] = EMBEDDINGS | {
    "layers.{i}.qkv": (
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    "layers.{i}.out": "layers.{i}.self_attn.o_proj",
    "layers.{i}.attention_norm": "layers.{i}.post_attention_layernorm",
    "layers.{i}.up": "layers.{i}.mlp.fc1",
    "layers.{i}.down": "layers.{i}.mlp.fc2",
    "layers.{i}.mlp_norm": "layers.{i}.post_mlp_layernorm",
}

LAYOUTS: dict[str, Mapping[str, Source]] = {  # a tensor that no other layout has → the layout
    "encoder.layer.0.attention.self.query.weight": STOCK,
    "encoder.layers.0.mixer.Wqkv.weight": FLASH,
    "encoder.layers.0.mixer.Wqkv.parametrizations.weight.original": FLASH,
    "layers.0.self_attn.q_proj.weight": PORT,
}

PREFIXES = ("", "roberta.")
MARKERS = ("[QueryMarker]", "[DocumentMarker]")  # before queries and documents of jina-colbert-v2

# What the publishers' own config classes fill in where `config.json` names no base of the rotations.
FLASH_THETA, PORT_THETA = 10_000.0, 20_000.0

# Rotations of another kind than ours: key of `config.json` → the only value that is served.
PLAIN_ROTATION = {"rotary_emb_scale_base": None, "rotary_emb_interleaved": False, "rope_scaling": None}


def recognises(config: dict[str, object]) -> bool:
    """Each by its own name, jina-embeddings-v3 by its port's, jina-reranker-v2 by its architecture alone.

    RoBERTa with a masked-language-model head is an encoder of sparse vectors, which is another family.
    """
    if "model_type" not in config:
        return config.get("architectures") == ["XLMRobertaForSequenceClassification"]
    if config["model_type"] == "roberta":
        return config.get("architectures") != ["RobertaForMaskedLM"]
    return config["model_type"] in ("xlm-roberta", "camembert", "jina_embeddings_v3")


def load(
    checkpoint: Checkpoint, spec: ModelSpec, placement: Placement
) -> TextEmbedder | ColBERT | HeadedEmbedder | CrossEncoder:
    """A sentence encoder, ColBERT or cross-encoder from an XLM-RoBERTa checkpoint.

    Its names are bare or behind `roberta.`.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    shape = read_positions(checkpoint.config, read_shape(checkpoint.config))
    layout = read_layout(checkpoint)
    if is_colbert(checkpoint.config):
        # On mask tokens the metadata of jina-colbert-v2 and its README differ; the README is the later word.
        return load_colbert(
            checkpoint,
            spec,
            placement,
            shape,
            layout,
            prefixes=PREFIXES,
            markers=MARKERS,
            attends_to_masks=True,
        )
    if spec.kind == "reranker":
        return load_cross_encoder(checkpoint, spec, placement, shape, layout, prefixes=PREFIXES)
    embedder = load_embedder(
        checkpoint,
        spec,
        placement,
        shape,
        woven_layout(shape, layout) if is_woven(checkpoint) else layout,
        prefixes=PREFIXES,
        pooling="mean" if shape.positions == "rotary" else None,
        unused=rf"{UNUSED}|{WOVEN}",
        adapters=load_adapters(checkpoint, spec, shape, layout, placement),
    )
    heads = read_heads(checkpoint, shape.hidden, placement)
    return HeadedEmbedder(embedder, heads) if heads else embedder


def load_adapters(
    checkpoint: Checkpoint, spec: ModelSpec, shape: Shape, layout: Mapping[str, Source], placement: Placement
) -> Adapters:
    """The adapters that the spec's tasks name; none where they name none.

    Raises:
        CheckpointError: they do not fit, or are not there: whether such weights are the bare ones or merged with an
            adapter cannot be told.
    """
    if is_woven(checkpoint):
        return read_woven(checkpoint, spec, shape, layout, placement, prefixes=PREFIXES)
    if layout is PORT:
        return read_foldered(checkpoint, spec, shape, layout, placement)
    if names := adapters_of(spec):
        raise CheckpointError(
            f"{checkpoint.directory} has none of the adapters {names} that tasks of '{spec.id}' need; "
            "serve it under a name of your own to use its weights as they are"
        )
    return [], {}


def read_layout(checkpoint: Checkpoint) -> Mapping[str, Source]:
    """Which of the layouts the tensor names are.

    Raises:
        CheckpointError: none of them.
    """
    for tell, layout in LAYOUTS.items():
        if checkpoint.has(tell):
            return layout
    raise CheckpointError(f"{checkpoint.directory} is not XLM-RoBERTa: no tensor is named {' or '.join(LAYOUTS)}")


def read_positions(config: Mapping[str, Any], shape: Shape) -> Shape:
    """The shape with the positions that `config.json` asks for.

    Raises:
        CheckpointError: positions of another kind, or rotations that are scaled, partial or interleaved.
    """
    port = config.get("model_type") == "jina_embeddings_v3"
    kind = "rotary" if port else config.get("position_embedding_type", "absolute")
    match kind:
        case "absolute":
            # Positions count from the one after the padding token's id.
            return replace(shape, position_offset=config["pad_token_id"] + 1)
        case "rotary":
            return replace(
                shape,
                positions="rotary",
                rope_theta=read_theta(config, shape, usual=PORT_THETA if port else FLASH_THETA),
            )
        case _:
            raise CheckpointError(f"position_embedding_type '{kind}' is not served; known are absolute and rotary")


def read_theta(config: Mapping[str, Any], shape: Shape, *, usual: float) -> float:
    """The base of the rotations, under any of its names; `usual` where there is none.

    Raises:
        CheckpointError: names with several values, or rotations that are scaled, partial or interleaved.
    """
    rope = config.get("rope_parameters") or {}
    asked = {key: config[key] for key, served in PLAIN_ROTATION.items() if config.get(key, served) != served}
    if config.get("rotary_emb_dim", shape.head_dim) != shape.head_dim:
        asked["rotary_emb_dim"] = config["rotary_emb_dim"]
    if rope.get("rope_type", "default") != "default":
        asked["rope_parameters"] = rope
    if asked:
        raise CheckpointError(f"rotations of this kind are not served: {asked}")
    told = (config.get("rotary_emb_base"), config.get("rope_theta"), rope.get("rope_theta"))
    bases = {float(base) for base in told if base is not None}
    if len(bases) > 1:
        raise CheckpointError(
            f"rotary_emb_base, rope_theta and rope_parameters disagree: {sorted(bases)}; keep the right one"
        )
    return bases.pop() if bases else usual
