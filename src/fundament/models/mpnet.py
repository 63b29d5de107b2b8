"""MPNet (Song et al., 2020): all-mpnet-base-v2 and other sentence encoders of the same architecture.

A BERT without types of tokens, with T5's bias by distance beside the table of positions.
"""

from dataclasses import replace

from fundament.backbone.bert import EMBEDDINGS, MLP, UNUSED, load_embedder, read_shape
from fundament.backbone.checkpoint import Checkpoint, Config, Source
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.transformer import Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

LAYOUT: dict[str, Source] = (
    EMBEDDINGS
    | MLP
    | {
        "distances": "encoder.relative_attention_bias",
        "layers.{i}.qkv": (
            "encoder.layer.{i}.attention.attn.q",
            "encoder.layer.{i}.attention.attn.k",
            "encoder.layer.{i}.attention.attn.v",
        ),
        "layers.{i}.out": "encoder.layer.{i}.attention.attn.o",
        "layers.{i}.attention_norm": "encoder.layer.{i}.attention.LayerNorm",
    }
)

PREFIXES = ("", "mpnet.")

# Constants of transformers' code, which passes over what `config.json` says of them.
PADDING, N_BUCKETS, MAX_DISTANCE = 1, 32, 128
FIXED = {"pad_token_id": PADDING, "relative_attention_num_buckets": N_BUCKETS}


def recognises(config: dict[str, object]) -> bool:
    """MPNet, whatever its head: sentence encoders are published under the masked language model's name too."""
    return config.get("model_type") == "mpnet"


def load(checkpoint: Checkpoint, spec: ModelSpec, placement: Placement) -> TextEmbedder:
    """A sentence encoder from an MPNet checkpoint in transformers' names, bare or behind `mpnet.`.

    Raises:
        CheckpointError: the checkpoint does not fit, or its config asks for what is not served.
    """
    return load_embedder(
        checkpoint,
        spec,
        placement,
        read_distances(checkpoint.config),
        LAYOUT,
        prefixes=PREFIXES,
        unused=rf"{UNUSED}|lm_head\..*",
    )


def read_distances(config: Config) -> Shape:
    """The shape that `config.json` tells, with its positions and distances.

    Raises:
        CheckpointError: a key is missing, or says another number than transformers reads.
    """
    for key, served in FIXED.items():
        if config.get(key, served) != served:
            raise CheckpointError(f"{config.where} says {key} {config[key]}, which is not served; known is {served}")
    return replace(read_shape(config), position_offset=PADDING + 1, n_buckets=N_BUCKETS, max_distance=MAX_DISTANCE)
