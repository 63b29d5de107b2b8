"""sentence-transformers' dense layers behind the pooling, and DistilBERT with one."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DistilBertConfig, DistilBertModel

from tests.checkpoints import random_tensors, save, word_piece

TANH, IDENTITY = "torch.nn.modules.activation.Tanh", "torch.nn.modules.linear.Identity"


def write_dense(directory: Path, sizes: list[int], *, bias: bool, pickled: bool = False, **config: Any) -> None:
    """Layers from one size to the next, as LaBSE and EmbeddingGemma have theirs behind the second of their modules.

    Args:
        directory: where `modules.json` is.
        sizes: numbers that go into the first layer, and that each gives.
        bias: whether they have one.
        pickled: write `pytorch_model.bin` in place of safetensors, as older ones are.
        config: more keys of their `config.json`.
    """
    modules = json.loads((directory / "modules.json").read_text())
    for place, (n_in, n_out) in enumerate(pairwise(sizes), start=2):
        folder = directory / f"{place}_Dense"
        folder.mkdir()
        told = {"in_features": n_in, "out_features": n_out, "bias": bias, **config}
        (folder / "config.json").write_text(json.dumps(told))
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": (n_out, n_in)}
        tensors = random_tensors(shapes | ({"linear.bias": (n_out,)} if bias else {}), seed=place)
        if pickled:
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            save_file(tensors, folder / "model.safetensors")
        modules.insert(place, {"path": folder.name, "type": "sentence_transformers.models.Dense"})
    for place, module in enumerate(modules):
        module |= {"idx": place, "name": str(place)}
    (directory / "modules.json").write_text(json.dumps(modules))


def distilbert(directory: Path, *, pooling: str = "mean_tokens") -> Path:
    """A sentence encoder like distiluse: DistilBERT, the mean or another pooling, a layer with tanh to 24 numbers."""
    tokenizer = word_piece()
    sizes = {"dim": 48, "n_heads": 6, "n_layers": 2, "hidden_dim": 40, "max_position_embeddings": 130}
    config = DistilBertConfig(vocab_size=tokenizer.get_vocab_size(), architectures=["DistilBertModel"], **sizes)
    shapes = {name: tuple(t.shape) for name, t in DistilBertModel(config).state_dict().items()}
    save(directory, config.to_dict(), random_tensors(shapes), tokenizer, pooling=pooling)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    write_dense(directory, [48, 24], bias=True, activation_function=TANH)
    return directory
