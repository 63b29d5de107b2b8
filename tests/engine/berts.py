"""Random BERTs large enough that memory can be seen to come and go."""

from datetime import date
from pathlib import Path

import torch

from fundament.catalog import ModelSpec
from fundament.engine.weights import Local
from tests.checkpoints import random_tensors, save, word_piece

VOCAB, HIDDEN = 20_000, 256  # 20 MB of float32, mostly token embeddings, so that memory can be seen to come and go


def bert(directory: Path, seed: int, *, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> Local:
    """A random BERT of one layer, saved in that number format."""
    linear = {"query": (HIDDEN, HIDDEN), "key": (HIDDEN, HIDDEN), "value": (HIDDEN, HIDDEN)}
    layer = "encoder.layer.0"
    modules: dict[str, tuple[int, ...]] = {
        **{f"{layer}.attention.self.{name}": shape for name, shape in linear.items()},
        f"{layer}.attention.output.dense": (HIDDEN, HIDDEN),
        f"{layer}.intermediate.dense": (64, HIDDEN),
        f"{layer}.output.dense": (HIDDEN, 64),
    }
    norms = ["embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocab, HIDDEN),
        "embeddings.position_embeddings.weight": (64, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
    }
    shapes |= {f"{name}.weight": shape for name, shape in modules.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    shapes |= {f"{name}.{kind}": (HIDDEN,) for name in norms for kind in ("weight", "bias")}
    config = {
        "model_type": "bert",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    }
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(shapes, seed).items()}
    save(directory, config, tensors, word_piece(), pooling="mean_tokens")
    spec = ModelSpec(
        id=directory.name,
        family="bert",
        name=directory.name,
        released=date(2024, 1, 1),
        licence="Apache-2.0",
        context=64,
        dim=HIDDEN,
    )
    return Local(spec, directory)
