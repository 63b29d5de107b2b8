"""What the descendants of BERT share: the keys of `config.json`, tensor names, and how a sentence encoder is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from fundament.backbone import cross_encoder, embedder
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.classifier_head import HeadKind, bert_head
from fundament.backbone.cross_encoder import CrossEncoder
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import read_activation
from fundament.backbone.pooling import Pooling
from fundament.backbone.sentence import read_pooling, unneeded_heads
from fundament.backbone.transformer import Adapter, Shape
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

EMBEDDINGS: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}

ATTENTION: dict[str, Source] = {
    "layers.{i}.qkv": (
        "encoder.layer.{i}.attention.self.query",
        "encoder.layer.{i}.attention.self.key",
        "encoder.layer.{i}.attention.self.value",
    ),
    "layers.{i}.out": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attention_norm": "encoder.layer.{i}.attention.output.LayerNorm",
}

MLP: dict[str, Source] = {
    "layers.{i}.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
}

FLASH: dict[str, Source] = EMBEDDINGS | {
    "embedding_norm": "emb_ln",
    "layers.{i}.qkv": "encoder.layers.{i}.mixer.Wqkv",
    "layers.{i}.out": "encoder.layers.{i}.mixer.out_proj",
    "layers.{i}.attention_norm": "encoder.layers.{i}.norm1",
    "layers.{i}.up": "encoder.layers.{i}.mlp.fc1",
    "layers.{i}.down": "encoder.layers.{i}.mlp.fc2",
    "layers.{i}.mlp_norm": "encoder.layers.{i}.norm2",
}
"""The names of Jina's encoders that fuse queries, keys and values."""

DISTILBERT: dict[str, Source] = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers.{i}.qkv": (
        "transformer.layer.{i}.attention.q_lin",
        "transformer.layer.{i}.attention.k_lin",
        "transformer.layer.{i}.attention.v_lin",
    ),
    "layers.{i}.out": "transformer.layer.{i}.attention.out_lin",
    "layers.{i}.attention_norm": "transformer.layer.{i}.sa_layer_norm",
    "layers.{i}.up": "transformer.layer.{i}.ffn.lin1",
    "layers.{i}.down": "transformer.layer.{i}.ffn.lin2",
    "layers.{i}.mlp_norm": "transformer.layer.{i}.output_layer_norm",
}

UNUSED = r"(.*\.)?(position_ids|pooler\.dense\.(weight|bias))"
"""Names of a buffer that is no weight, and of the head of next-sentence prediction, which no embedding needs."""


def read_shape(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` in BERT's keys tells, with a table of absolute positions.

    Raises:
        CheckpointError: a key is missing, or the activation is not served.
    """
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_attention_heads"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        norm_eps=config["layer_norm_eps"],
        n_positions=config["max_position_embeddings"],
        n_types=config.get("type_vocab_size", 0),  # MPNet has none
        embedding_norm=True,
        activation=read_activation(config.get("hidden_act", "gelu")),  # some configs leave out what is usual
    )


def read_distilbert_shape(config: Mapping[str, Any]) -> Shape:
    """The shape that a `config.json` in DistilBERT's keys tells: BERT's without types of tokens.

    Raises:
        CheckpointError: a key is missing, or the activation is not served.
    """
    return Shape(
        vocab=config["vocab_size"],
        hidden=config["dim"],
        intermediate=config["hidden_dim"],
        n_layers=config["n_layers"],
        n_heads=config["n_heads"],
        n_kv_heads=config["n_heads"],
        head_dim=config["dim"] // config["n_heads"],
        norm_eps=1e-12,  # its code's own, in no config
        n_positions=config["max_position_embeddings"],
        embedding_norm=True,
        activation=read_activation(config["activation"]),
    )


def check_positions(checkpoint: Checkpoint, spec: ModelSpec, shape: Shape) -> None:
    """Compare the table of positions, where there is one, with the length that the catalogue promises.

    Raises:
        CheckpointError: the table is shorter.
    """
    if shape.positions == "absolute" and shape.n_positions - shape.position_offset < spec.context:
        raise CheckpointError(
            f"{checkpoint.directory} has positions for {shape.n_positions - shape.position_offset} tokens, "
            f"{spec.id} reads {spec.context}; is it another model?"
        )


def load_embedder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    *,
    prefixes: tuple[str, ...],
    pooling: Pooling | None = "mean",
    unused: str = UNUSED,
    adapters: tuple[Sequence[Adapter], Mapping[str, int]] = ((), {}),
) -> TextEmbedder:
    """A sentence encoder, as `embedder.load` puts it together; `pooling` is that where the checkpoint names none.

    Raises:
        CheckpointError: the checkpoint does not fit, or its position table is shorter than the catalogue's context.
    """
    check_positions(checkpoint, spec, shape)
    return embedder.load(
        checkpoint,
        spec,
        placement,
        shape,
        layout,
        read_pooling(checkpoint, pooling),
        unused=f"{unused}|{unneeded_heads(checkpoint)}",
        prefixes=prefixes,
        adapters=adapters,
    )


def load_cross_encoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    *,
    prefixes: tuple[str, ...],
    kind: HeadKind | None = None,
) -> CrossEncoder:
    """A cross-encoder, as `cross_encoder.load` puts it together; `kind` is None where the tensor names tell the head.

    Raises:
        CheckpointError: the checkpoint does not fit, its position table is shorter than the catalogue's context, it is
            no sequence classifier, or it tells several labels apart.
    """
    check_positions(checkpoint, spec, shape)
    kind = kind or bert_head(checkpoint, prefixes)
    return cross_encoder.load(checkpoint, spec, placement, shape, layout, kind, prefixes=prefixes, unused=UNUSED)
