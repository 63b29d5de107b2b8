"""Transformers of Llama's make (Touvron et al., 2023): what Qwen and EuroBERT say alike, in names, config and files."""

from dataclasses import replace
from typing import Any

from fundament.backbone import cross_encoder, embedder
from fundament.backbone.adapters import read_adapters
from fundament.backbone.chat_template import refuse_pair_template
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.classifier_head import HeadKind
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import read_activation
from fundament.backbone.pooling import Pooling
from fundament.backbone.sentence import read_pooling, unneeded_heads
from fundament.backbone.transformer import Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

LAYOUT: dict[str, Source] = {
    "tokens": "embed_tokens",
    "layers.{i}.qkv": (
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    "layers.{i}.q_norm": "layers.{i}.self_attn.q_norm",
    "layers.{i}.k_norm": "layers.{i}.self_attn.k_norm",
    "layers.{i}.out": "layers.{i}.self_attn.o_proj",
    "layers.{i}.attention_norm": "layers.{i}.input_layernorm",
    "layers.{i}.gate": "layers.{i}.mlp.gate_proj",
    "layers.{i}.up": "layers.{i}.mlp.up_proj",
    "layers.{i}.down": "layers.{i}.mlp.down_proj",
    "layers.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "final_norm": "norm",
}

PREFIXES = ("", "model.")

IGNORED = r"(.*\.)?(lm_head\.weight|rotary_emb\.inv_freq)"
"""The language model's head, and a table that older versions of transformers saved."""


def read_shape(config: dict[str, Any]) -> Shape:
    """The shape that a `config.json` of this make says: bidirectional, without biases or q/k norms.

    Raises:
        CheckpointError: a setting that is not served, or none where the architecture has no usual one.
    """
    n_heads = config["num_attention_heads"]
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads") or n_heads,
        # A wrong guess here does not fit the checkpoint's projections, so it fails to load.
        head_dim=config.get("head_dim") or config["hidden_size"] // n_heads,
        norm="rms",
        norm_eps=config["rms_norm_eps"],
        pre_norm=True,
        positions="rotary",
        rope_theta=read_rope_theta(config),
        qkv_bias=False,
        out_bias=False,
        gated=True,
        activation=read_activation(config["hidden_act"]),
        up_bias=False,
        down_bias=False,
    )


def read_rope_theta(config: dict[str, Any]) -> float:
    """The base of the rotary frequencies: `rope_theta`, of its own or in `rope_parameters`; there is no default.

    Raises:
        CheckpointError: it is not said, said twice, or the rotations are scaled in a way that is not served.
    """
    places = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    for told in places:
        kind = told.get("rope_type", told.get("type", "default"))
        others = sorted(told.keys() - {"rope_type", "type", "rope_theta"})
        if kind != "default" or others:
            raise CheckpointError(
                f"config.json asks for rotary positions of type '{kind}' {others}; only 'default' is served"
            )
    thetas = {float(place["rope_theta"]) for place in (config, *places) if place.get("rope_theta") is not None}
    if len(thetas) != 1:
        raise CheckpointError(f"config.json should say one rope_theta, and says {sorted(thetas) or 'none'}")
    return thetas.pop()


def read_qwen_shape(config: dict[str, Any]) -> Shape:
    """The shape of Qwen2, which has biases on queries, keys and values, and of Qwen3, which normalises per head."""
    shape = replace(read_shape(config), causal=True, window=read_window(config))
    return replace(shape, qkv_bias=True) if config["model_type"] == "qwen2" else replace(shape, qk_norm="head")


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


def last_token(checkpoint: Checkpoint) -> Pooling:
    """The pooling of a model that is known to take the last token.

    Raises:
        CheckpointError: `1_Pooling/config.json` says another.
    """
    if (told := read_pooling(checkpoint, "last")) != "last":
        raise CheckpointError(
            f"{checkpoint.directory} should pool the last token; its 1_Pooling/config.json says '{told}'"
        )
    return "last"


def load_embedder(
    checkpoint: Checkpoint, spec: ModelSpec, placement: Placement, shape: Shape, pooling: Pooling
) -> TextEmbedder:
    """A text embedder from names bare or behind `model.`, with its adapters where the spec's tasks name some."""
    return embedder.load(
        checkpoint,
        spec,
        placement,
        shape,
        LAYOUT,
        pooling,
        unused=f"{IGNORED}|{unneeded_heads(checkpoint)}",
        prefixes=PREFIXES,
        adapters=read_adapters(checkpoint, spec, shape, LAYOUT, placement),
    )


def load_cross_encoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    kind: HeadKind,
    *,
    padding: int | None = None,
) -> CrossEncoder:
    """A cross-encoder from names bare or behind `model.`, as `cross_encoder.load` puts it together.

    Raises:
        CheckpointError: the checkpoint does not fit, or its chat template writes pairs.
    """
    refuse_pair_template(checkpoint)
    return cross_encoder.load(
        checkpoint, spec, placement, shape, LAYOUT, kind, prefixes=PREFIXES, unused=IGNORED, padding=padding
    )
