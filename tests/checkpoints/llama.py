"""What the tiny Qwen and EuroBERT checkpoints share: tensor names, PEFT adapters, a byte-BPE tokenizer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from fundament.backbone.embedder import TextEmbedder
from fundament.catalog import ModelSpec, Task
from fundament.core import Embed, Item
from fundament.engine.loading import load_model
from fundament.engine.weights import Local
from tests.conftest import FLOAT32

END = "<|endoftext|>"
PROJECTIONS = {  # name → outputs and inputs, by config keys
    "self_attn.q_proj": ("q", "hidden_size"),
    "self_attn.k_proj": ("kv", "hidden_size"),
    "self_attn.v_proj": ("kv", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "q"),
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
ADAPTERS = ("retrieval", "text-matching", "clustering", "classification")
TASKS = MappingProxyType(
    {
        "retrieval.query": Task("Query: ", "retrieval"),
        "retrieval.passage": Task("Document: ", "retrieval"),
        **{name: Task("Document: ", name) for name in ADAPTERS[1:]},
    }
)

Config = dict[str, Any]


def sizes(config: Config) -> dict[str, int]:
    """Every size by name, with the widths of queries (`q`) and of keys and values (`kv`)."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    widths = {"q": config["num_attention_heads"] * head_dim, "kv": config["num_key_value_heads"] * head_dim}
    return {**{key: value for key, value in config.items() if isinstance(value, int)}, **widths, "head": head_dim}


def tensors(config: Config, *, qkv_bias: bool = False, qk_norm: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the public names, bare, large enough that every one of them shows in the result."""
    draw, size = torch.Generator().manual_seed(seed), sizes(config)

    def matrix(n_out: int, n_in: int) -> Tensor:
        return torch.randn(n_out, n_in, generator=draw) * 1.5 / n_in**0.5

    def vector(n: int, mean: float) -> Tensor:
        return mean + 0.3 * torch.randn(n, generator=draw)

    found = {"embed_tokens.weight": torch.randn(size["vocab_size"], size["hidden_size"], generator=draw)}
    for i in range(size["num_hidden_layers"]):
        layer = f"layers.{i}"
        for name, (n_out, n_in) in PROJECTIONS.items():
            found[f"{layer}.{name}.weight"] = matrix(size[n_out], size[n_in])
            if qkv_bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{layer}.{name}.bias"] = vector(size[n_out], 0)
        if qk_norm:
            found[f"{layer}.self_attn.q_norm.weight"] = vector(size["head"], 1)
            found[f"{layer}.self_attn.k_norm.weight"] = vector(size["head"], 1)
        found[f"{layer}.input_layernorm.weight"] = vector(size["hidden_size"], 1)
        found[f"{layer}.post_attention_layernorm.weight"] = vector(size["hidden_size"], 1)
    found["norm.weight"] = vector(size["hidden_size"], 1)
    return found


def tokenizer(*, ends: bool) -> Tokenizer:
    """Bytes and a few merges; `ends` appends the end token as Qwen3-Embedding's post-processor does."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("e", "r"), (":", "Ġ"), ("Ġ", "s"), ("i", "n")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([END])
    if ends:
        end = made.token_to_id(END)
        made.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return made


VOCAB = tokenizer(ends=True).get_vocab_size()


def save(
    directory: Path, config: Config, weights: Mapping[str, Tensor], *, ends: bool = True, prefix: str = ""
) -> Path:
    """Write a model directory, the names bare or behind a prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer(ends=ends).save(str(directory / "tokenizer.json"))
    save_file({prefix + name: weight for name, weight in weights.items()}, directory / "model.safetensors")
    return directory


def adapter(config: Config, *, rank: int, seed: int) -> dict[str, Tensor]:
    """One adapter's tensors in PEFT's names."""
    draw, size, found = torch.Generator().manual_seed(seed), sizes(config), {}
    for i in range(size["num_hidden_layers"]):
        for name, (n_out, n_in) in PROJECTIONS.items():
            stem = f"base_model.model.layers.{i}.{name}"
            found[f"{stem}.lora_A.weight"] = torch.randn(rank, size[n_in], generator=draw) / size[n_in] ** 0.5
            found[f"{stem}.lora_B.weight"] = torch.randn(size[n_out], rank, generator=draw) * 0.3
    return found


def save_adapter(directory: Path, name: str, terms: Mapping[str, Tensor], **settings: Any) -> Path:
    """Write `adapters/NAME` beside the weights, its settings as PEFT writes them."""
    folder = directory / "adapters" / name
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.1,
        "bias": "none",
        "target_modules": sorted(name.rsplit(".", 1)[1] for name in PROJECTIONS),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    save_file(dict(terms), folder / "adapter_model.safetensors")
    return folder


def save_adapters(directory: Path, config: Config, *, rank: int = 4, alpha: int = 4) -> dict[str, dict[str, Tensor]]:
    """Write all four adapters; the tensors of each."""
    found = {name: adapter(config, rank=rank, seed=seed) for seed, name in enumerate(ADAPTERS, 1)}
    for name, terms in found.items():
        save_adapter(directory, name, terms, r=rank, lora_alpha=alpha)
    return found


def merged(weights: Mapping[str, Tensor], terms: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`W + scale * B @ A`, by hand."""
    found = dict(weights)
    for name in terms:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            weight = stem.removeprefix("base_model.model.") + ".weight"
            found[weight] = found[weight] + scale * terms[f"{stem}.lora_B.weight"] @ terms[name]
    return found


def resave(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file in place; None takes one away."""
    kept = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(kept, path)


def spec(family: str, *, tasks: Mapping[str, Task] = MappingProxyType({}), context: int = 64) -> ModelSpec:
    return ModelSpec(
        id="tiny",
        family=family,
        repo="somebody/tiny",  # one of one's own must say how it pools
        name="Tiny",
        released=date(2026, 1, 1),
        licence="x",
        context=context,
        dim=32,
        tasks=tasks,
    )


def load(directory: Path, its_spec: ModelSpec, placement: Any = FLOAT32) -> TextEmbedder:
    model = load_model(Local(its_spec, directory), placement)
    assert isinstance(model, TextEmbedder)
    return model


def rows(model: TextEmbedder, asked: list[tuple[str, str | None]]) -> list[Item]:
    """The rows of texts with their tasks, as so many callers would make them."""
    return [model.prepare(Embed(inputs=[text], task=task, truncate=True))[0] for text, task in asked]


def vectors(model: TextEmbedder, asked: list[tuple[str, str | None]]) -> Tensor:
    """All in one batch, `[texts, dim]`."""
    return torch.from_numpy(np.stack(model.forward(rows(model, asked))))


def asked(tasks: Iterable[str]) -> SearchStrategy[tuple[str, str | None]]:
    """A text with one of these tasks, or none."""
    return st.tuples(st.text(max_size=30), st.sampled_from([*tasks, None]))


def reference(network: torch.nn.Module, items: list[Item]) -> Tensor:
    """The last token's state of each row alone, by another implementation, `[rows, dim]`."""
    with torch.inference_mode():
        states = [network(input_ids=torch.from_numpy(item.features["ids"])[None]).last_hidden_state for item in items]
    return torch.stack([state[0, -1] for state in states])


def adapted(network: torch.nn.Module, directory: Path) -> PeftModel:
    """PEFT's own reading of a directory's four adapters, on another implementation of the base."""
    folders = {name: directory / "adapters" / name for name in ADAPTERS}
    made = PeftModel.from_pretrained(network, folders[ADAPTERS[0]], adapter_name=ADAPTERS[0])
    for name in ADAPTERS[1:]:
        made.load_adapter(folders[name], adapter_name=name)
    return made.eval()


def task_reference(network: PeftModel, items: list[Item], tasks: Sequence[str | None]) -> Tensor:
    """The last token's state of each row alone, `[rows, dim]`, its task's adapter switched on, of no task none."""
    found = []
    for item, task in zip(items, tasks, strict=True):
        if task is not None:
            network.set_adapter(TASKS[task].adapter)
        with nullcontext() if task else network.disable_adapter():
            found.append(reference(network, [item]))
    return torch.cat(found)
