"""Tiny jina-embeddings-v3: its own file with the adapters woven in, and its port with a folder for each."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fundament.backbone.device import Placement
from fundament.backbone.embedder import TextEmbedder
from fundament.catalog import CATALOG, ModelSpec
from fundament.engine.loading import load_model
from fundament.engine.weights import Local
from tests.checkpoints import unigram
from tests.checkpoints.xlm_roberta import HIDDEN, POSITIONS, flash_tensors, renamed, xlm_roberta

ORDER = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
RANK, ALPHA = 4, 1
TABLES = ("embeddings.word_embeddings", "embeddings.token_type_embeddings")

Terms = dict[str, tuple[Tensor, Tensor]]
"""Stem in the flash names → what every adapter has as A and B, stacked."""

CONTEXT = POSITIONS - 2


def spec(**facts: Any) -> ModelSpec:
    """The catalogue's entry, of this size."""
    published = CATALOG["jina-embeddings-v3"]
    kept = {name: getattr(published, name) for name in ("id", "family", "name", "released", "licence", "tasks")}
    return ModelSpec(**{**kept, "context": CONTEXT, "dim": HIDDEN, "late_chunking": True, "shortest_dim": 1, **facts})


def base() -> dict[str, Tensor]:
    """The base weights in the flash names."""
    return flash_tensors(unigram().get_vocab_size(), table=False)


def terms() -> Terms:
    """Random A and B of every linear layer and table, large enough to show."""
    draw, found = torch.Generator().manual_seed(3), {}
    for name, weight in base().items():
        if weight.ndim < 2:
            continue
        n_out, n_in = weight.shape
        stem, n = name.removesuffix(".weight"), len(ORDER)
        up, down = (torch.randn(size, generator=draw) * 0.6 for size in ((n, n_out, RANK), (n, RANK, n_in)))
        found[stem] = (up, down) if stem in TABLES else (down, up)
    return found


def woven(directory: Path, **config: Any) -> Path:
    """The original file: every weight of a linear layer or table is parametrized."""
    lora = {"lora_adaptations": list(ORDER), "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout_p": 0.0}
    xlm_roberta(directory, names="flash", positions="rotary", pooling="mean_tokens", prefix="roberta.", **lora | config)
    tensors = {f"roberta.{name}": tensor for name, tensor in base().items()}
    for stem, (a, b) in terms().items():
        parametrized = f"roberta.{stem}.parametrizations.weight"
        tensors[f"{parametrized}.original"] = tensors.pop(f"roberta.{stem}.weight")
        tensors |= {f"{parametrized}.0.lora_A": a, f"{parametrized}.0.lora_B": b}
    save_file(tensors, directory / "model.safetensors")
    return directory


def folder_of(directory: Path, task: str) -> Path:
    """Where the port has a task's adapter."""
    return directory / task.replace(".", "_").replace("-", "_")


def port(directory: Path) -> Path:
    """The port: base weights in transformers' names, and a folder of PEFT's for each adapter."""
    xlm_roberta(directory, names="port", positions="rotary", pooling=None)
    for place, task in enumerate(ORDER):
        folder = folder_of(directory, task)
        folder.mkdir()
        tensors = {}
        for stem, (a, b) in terms().items():
            if stem in TABLES:  # PEFT keeps a table's matrices turned round
                tensors[f"{stem}.lora_embedding_A"] = a[place].T.contiguous()
                tensors[f"{stem}.lora_embedding_B"] = b[place].T.contiguous()
                continue
            # A fused projection taken apart: each part has the whole A, and its own rows of B.
            halves = renamed({f"{stem}.lora_B.weight": b[place]}, "port")
            tensors |= halves
            tensors |= {name.replace("lora_B", "lora_A"): a[place].clone() for name in halves}
        save_file({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"]
        targets += [stem.rsplit(".", 1)[1] for stem in TABLES]
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": targets}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def resave(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file in place; None takes one away."""
    kept = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(kept, path)


def load(directory: Path, *, of: ModelSpec | None = None, dtype: torch.dtype = torch.float32) -> TextEmbedder:
    model = load_model(Local(of or spec(), directory), Placement(torch.device("cpu"), dtype))
    assert isinstance(model, TextEmbedder)
    return model


Layout = Literal["woven", "port"]
WRITERS = {"woven": woven, "port": port}
