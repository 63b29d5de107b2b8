"""T5's encoder (Raffel et al., 2020): jina-embedding-s-en-v1, its base and its large version."""

import re
from typing import Any

import torch

from fundament.backbone import embedder
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import read_activation
from fundament.backbone.sentence import read_pooling
from fundament.backbone.transformer import Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

TOKENS = ("shared", "encoder.embed_tokens")
"""Two names of one tensor; a checkpoint has either or both."""

LAYOUT: dict[str, Source] = {
    "layers.{i}.qkv": (
        "encoder.block.{i}.layer.0.SelfAttention.q",
        "encoder.block.{i}.layer.0.SelfAttention.k",
        "encoder.block.{i}.layer.0.SelfAttention.v",
    ),
    "layers.{i}.out": "encoder.block.{i}.layer.0.SelfAttention.o",
    "layers.{i}.attention_norm": "encoder.block.{i}.layer.0.layer_norm",
    "layers.{i}.down": "encoder.block.{i}.layer.1.DenseReluDense.wo",
    "layers.{i}.mlp_norm": "encoder.block.{i}.layer.1.layer_norm",
    # The first block's table serves all blocks.
    "distances": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "final_norm": "encoder.final_layer_norm",
}
PLAIN: dict[str, Source] = {"layers.{i}.up": "encoder.block.{i}.layer.1.DenseReluDense.wi"}
GATED: dict[str, Source] = {
    "layers.{i}.gate": "encoder.block.{i}.layer.1.DenseReluDense.wi_0",
    "layers.{i}.up": "encoder.block.{i}.layer.1.DenseReluDense.wi_1",
}

UNUSED = rf"{'|'.join(map(re.escape, TOKENS))}\.weight|decoder\..*|lm_head\.weight"
"""The other name of the token embeddings, and the half of a whole T5 that writes text."""


def recognises(config: dict[str, object]) -> bool:
    """T5, whole or its encoder alone."""
    return config.get("model_type") == "t5"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder:
    """A sentence encoder from a T5 checkpoint in transformers' names.

    Raises:
        CheckpointError: the checkpoint does not fit, or float16 is asked for.
    """
    if placement.states == torch.float16:
        raise CheckpointError(f"{spec.id} overflows in float16, as T5 models do; use --dtype bfloat16 or float32")
    shape = read_shape(checkpoint.config)
    layout = {"tokens": read_tokens(checkpoint)} | LAYOUT | (GATED if shape.gated else PLAIN)
    return embedder.load(checkpoint, spec, placement, shape, layout, read_pooling(checkpoint), unused=UNUSED)


def read_shape(config: dict[str, Any]) -> Shape:
    """The encoder that `config.json` tells.

    Raises:
        CheckpointError: a key is missing, or an MLP that is not served.
    """
    kind, _, name = str(config.get("feed_forward_proj", "relu")).rpartition("-")
    if kind not in ("", "gated"):
        raise CheckpointError(f"feed_forward_proj '{config['feed_forward_proj']}' is not served; known is gated-gelu")
    # By `gated-gelu` T5 1.1 means the tanh approximation.
    told = (config.get("dense_act_fn"), config.get("is_gated_act"))
    named = ("gelu_new" if (kind, name) == ("gated", "gelu") else name, kind == "gated")
    if any(value not in (None, own) for value, own in zip(told, named, strict=True)):
        raise CheckpointError(
            f"config.json: dense_act_fn, is_gated_act {told} are not those of feed_forward_proj {named}"
        )
    n_buckets = config["relative_attention_num_buckets"]
    max_distance = config.get("relative_attention_max_distance", 128)  # older configs do not say it
    if n_buckets < 4 or max_distance <= n_buckets // 4:
        raise CheckpointError(
            f"config.json: relative_attention_num_buckets {n_buckets} do not divide distances up to "
            f"relative_attention_max_distance {max_distance}"
        )
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["d_model"],
        intermediate=config["d_ff"],
        n_layers=config["num_layers"],
        n_heads=config["num_heads"],
        n_kv_heads=config["num_heads"],
        head_dim=config["d_kv"],
        norm="rms",
        norm_eps=config["layer_norm_epsilon"],
        pre_norm=True,
        positions=None,
        n_buckets=n_buckets,
        max_distance=max_distance,
        qkv_bias=False,
        out_bias=False,
        attention_scale=1.0,
        gated=kind == "gated",
        activation=read_activation(named[0]),
        up_bias=False,
        down_bias=False,
    )


def read_tokens(checkpoint: Checkpoint) -> str:
    """The name that the token embeddings have.

    Raises:
        CheckpointError: both names, with different numbers.
    """
    found = [name for name in TOKENS if f"{name}.weight" in checkpoint.names]
    if len(found) == 2 and not torch.equal(*(checkpoint.tensor(f"{name}.weight") for name in found)):
        raise CheckpointError(
            f"{checkpoint.directory} has other token embeddings under {found[0]} than under {found[1]}"
        )
    return found[0] if found else TOKENS[0]
