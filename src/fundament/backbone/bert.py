"""What the descendants of BERT share: the keys of `config.json`, tensor names, and how a sentence encoder is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.cross_encoder import HEADS, CrossEncoder, load_head, second_type
from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.backbone.linear import read_activation
from fundament.backbone.pooling import Pooling
from fundament.backbone.sentence import read_pooling
from fundament.backbone.tokenizing import TextTokenizer
from fundament.backbone.transformer import Adapter, Shape, Transformer, parameters
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
        n_types=config["type_vocab_size"],
        embedding_norm=True,
        activation=read_activation(config.get("hidden_act", "gelu")),  # some configs leave out what is usual
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
    """Read the weights and put the sentence encoder together.

    Args:
        checkpoint: where the files are.
        spec: what the catalogue says of the model.
        placement: where the weights go.
        shape: what to build.
        layout: where each module's tensors are.
        prefixes: what the tensor names may begin with.
        pooling: the pooling where the checkpoint names none.
        unused: a pattern of tensor names that are known and not needed.
        adapters: what rows may ask for, and the place of each by its name.

    Raises:
        CheckpointError: the checkpoint does not fit, or its position table is shorter than the catalogue's context.
    """
    check_positions(checkpoint, spec, shape)
    weights = checkpoint.read(
        parameters(shape),
        layout,
        device=placement.device,
        dtype=placement.dtype,
        prefixes=prefixes,
        ignored=unused,
    )
    return TextEmbedder(
        TextTokenizer(checkpoint.directory, spec.context),
        Transformer(shape, weights, adapters[0]),
        read_pooling(checkpoint, pooling),
        spec,
        adapters[1],
    )


def load_cross_encoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    placement: Placement,
    shape: Shape,
    layout: Mapping[str, Source],
    *,
    prefixes: tuple[str, ...],
) -> CrossEncoder:
    """Read the weights and put the cross-encoder together.

    Args:
        checkpoint: where the files are.
        spec: what the catalogue says of the model.
        placement: where the weights go.
        shape: what to build.
        layout: where each module's tensors are.
        prefixes: what the encoder's tensor names may begin with.

    Raises:
        CheckpointError: the checkpoint does not fit, is no sequence classifier, or tells several labels apart.
    """
    check_positions(checkpoint, spec, shape)
    head = load_head(checkpoint, shape, placement, prefixes)
    weights = checkpoint.read(
        parameters(shape),
        layout,
        device=placement.device,
        dtype=placement.dtype,
        prefixes=prefixes,
        ignored=rf"{UNUSED}|{HEADS}",
    )
    adapters = [second_type(weights["types.weight"])] if shape.n_types > 1 else []
    tokenizer = TextTokenizer(checkpoint.directory, spec.context)
    return CrossEncoder(tokenizer, Transformer(shape, weights, adapters), head, spec)
