"""Low-rank adapters: folders as PEFT writes them, and terms woven into the weights, all adapters in one tensor."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fundament.backbone.checkpoint import Checkpoint, Source, Weights
from fundament.backbone.device import Placement
from fundament.backbone.linear import LowRank
from fundament.backbone.packed import BASE
from fundament.backbone.transformer import Adapter, Shape, adaptable
from fundament.catalog import ModelSpec
from fundament.errors import CheckpointError

_FOLDER = "adapters"
_PREFIX = "base_model.model."

_PLAIN: dict[str, Any] = {  # what makes `W + lora_alpha / r * B @ A` the whole truth
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "layers_to_transform": None,
    "layer_replication": None,
}
_EMBEDDINGS = ("tokens", "types")  # modules that are tables: there A and B change roles

_POOLER = r"(.*\.)?pooler\.dense\.(lora_[AB]\.weight|parametrizations\.weight\.(original|0\.lora_[AB]))"

WOVEN = rf".*\.parametrizations\.weight\.0\.lora_[AB]|{_POOLER}"
"""Tensors of a woven checkpoint that are no base weight which embeddings need."""

Adapters = tuple[list[Adapter], dict[str, int]]
"""Adapters, and the place of each in the list by its name; `BASE` where its terms are merged into the weights."""


def adapters_of(spec: ModelSpec) -> list[str]:
    """The adapters that the spec's tasks name, in their order."""
    return list(dict.fromkeys(task.adapter for task in spec.tasks.values() if task.adapter))


def read_adapters(
    checkpoint: Checkpoint, spec: ModelSpec, shape: Shape, layout: Mapping[str, Source], placement: Placement
) -> Adapters:
    """The adapters that the spec's tasks name, from `adapters/NAME`, and the place of each in the list.

    A checkpoint without adapters has them merged into its weights, for the one task that `task_names` of its
    `config.json` names: that adapter's place is then `BASE`, and the others have none.

    Args:
        checkpoint: the base weights' own.
        spec: whose tasks name adapters.
        shape: of the base weights.
        layout: of the base weights; adapters call modules by the same names.
        placement: where the adapters go.

    Raises:
        CheckpointError: an adapter that is missing or not plain LoRA, or weights merged for nobody knows which task.
    """
    names = adapters_of(spec)
    folder = checkpoint.directory / _FOLDER
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        return [], _merged(checkpoint, spec, names)
    if missing := sorted(set(names) - set(found)):
        raise CheckpointError(f"{folder} has {found}, and not {missing}, which tasks of '{spec.id}' need")
    if not names:
        raise CheckpointError(
            f"{folder} has {found}, and '{spec.id}' has no task that chooses one of them; "
            f"serve the directory under the model's own id: --model ID={checkpoint.directory}"
        )
    adapters = [read_adapter(Checkpoint(folder / name), shape, layout, placement) for name in names]
    return adapters, {name: place for place, name in enumerate(names)}


def read_foldered(
    checkpoint: Checkpoint, spec: ModelSpec, shape: Shape, layout: Mapping[str, Source], placement: Placement
) -> Adapters:
    """The adapters that the spec's tasks name, each in a folder beside the weights: `retrieval_query/` and so on.

    Raises:
        CheckpointError: an adapter that is missing or not plain LoRA.
    """
    names = adapters_of(spec)
    folders = [checkpoint.directory / name.replace(".", "_").replace("-", "_") for name in names]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        raise CheckpointError(
            f"{checkpoint.directory} has no folders {missing} with the adapters that tasks of '{spec.id}' need; "
            "get the whole repository"
        )
    adapters = [read_adapter(Checkpoint(folder), shape, layout, placement) for folder in folders]
    return adapters, {name: place for place, name in enumerate(names)}


def has_adapters(checkpoint: Checkpoint) -> bool:
    """Whether a directory holds adapters: woven into its weights, or in folders as PEFT writes them."""
    folders = ("*", f"{_FOLDER}/*")
    beside = any(any(checkpoint.directory.glob(f"{folder}/adapter_config.json")) for folder in folders)
    return beside or is_woven(checkpoint)


def is_woven(checkpoint: Checkpoint) -> bool:
    """Whether the weights hold their adapters inside, as PyTorch's parametrizations name them."""
    return any(".parametrizations." in name for name in checkpoint.names)


def woven_layout(shape: Shape, layout: Mapping[str, Source]) -> dict[str, Source]:
    """The layout of base weights whose every linear layer and table has adapters woven in."""
    return dict(layout) | {
        f"{pattern}.weight": f"{layout[pattern]}.parametrizations.weight.original" for pattern in _patterns(shape)
    }


def read_woven(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    shape: Shape,
    layout: Mapping[str, Source],
    placement: Placement,
    *,
    prefixes: tuple[str, ...],
) -> Adapters:
    """The adapters of a checkpoint that holds all of them in each parametrized tensor, in `lora_adaptations`' order.

    Where the weight is `[out, in]`, a linear layer has A as `[adapters, rank, in]` and B as `[adapters, out, rank]`; a
    table of n rows has A as `[adapters, n, rank]` and B as `[adapters, rank, dim]`. An adapter adds
    `lora_alpha / lora_rank` times their product.

    Raises:
        CheckpointError: other adapters than the spec's, or tensors too few, too many or of other shapes, all listed.
    """
    config, names = checkpoint.config, adapters_of(spec)
    order = config["lora_adaptations"]
    if not names:
        raise CheckpointError(
            f"{checkpoint.directory} holds the adapters {order}, and '{spec.id}' has no task that chooses one of them; "
            f"serve the directory under the model's own id: --model ID={checkpoint.directory}"
        )
    if sorted(order) != sorted(names):
        raise CheckpointError(
            f"{checkpoint.directory}: lora_adaptations of config.json should name {names}, which tasks of '{spec.id}' "
            f"need, not {order}"
        )
    adapters = read_terms(checkpoint, config, shape, layout, placement, n_adapters=len(order), prefixes=prefixes)
    return list(adapters), {name: place for place, name in enumerate(order)}


def read_terms(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    shape: Shape,
    layout: Mapping[str, Source],
    placement: Placement,
    *,
    n_adapters: int,
    prefixes: tuple[str, ...],
) -> list[dict[str, LowRank]]:
    """What each of so many woven adapters adds to every linear layer and table.

    `config` says `lora_rank` and `lora_alpha`.

    Raises:
        CheckpointError: tensors too few, too many or of other shapes, all listed.
    """
    rank = int(config["lora_rank"])
    parameters: dict[str, tuple[int, ...]] = {}
    sources: dict[str, Source] = {}
    for module, (n_out, n_in) in adaptable(shape).items():
        up, down = ("A", "B") if module in _EMBEDDINGS else ("B", "A")
        parameters[f"{module}.lora_{up}"] = (n_adapters, n_out, rank)
        parameters[f"{module}.lora_{down}"] = (n_adapters, rank, n_in)
    for pattern in _patterns(shape):
        stem = f"{layout[pattern]}.parametrizations.weight.0"
        sources |= {pattern: layout[pattern]} | {f"{pattern}.lora_{part}": f"{stem}.lora_{part}" for part in "AB"}
    scale = float(config["lora_alpha"]) / rank
    read = checkpoint.read(
        parameters,
        sources,
        replace(placement, dtype=torch.float32),  # the scale is multiplied in before rounding
        prefixes=prefixes,
        ignored=rf"(?!.*\.lora_[AB]$).*|{_POOLER}",
    )
    adapters: list[dict[str, LowRank]] = [{} for _ in range(n_adapters)]
    for module in adaptable(shape):
        up, down = ("A", "B") if module in _EMBEDDINGS else ("B", "A")
        ups = (read[f"{module}.lora_{up}"] * scale).to(placement.states)
        downs = read[f"{module}.lora_{down}"].to(placement.states)
        for place, adapter in enumerate(adapters):
            adapter[module] = LowRank(downs[place], (ups[place],))
    return adapters


def merged(base: Weights, adapter: Adapter, placement: Placement) -> Weights:
    """Base weights with an adapter's terms added to them for good; both are float32 until they are summed."""

    def one(name: str) -> Tensor:
        module, kind = name.rsplit(".", 1)
        weight, term = base[name], adapter.get(module)
        if term is not None and kind == "weight":
            (up,) = term.ups
            weight = weight + up @ term.down
        return weight.to(placement.dtype_of(name))

    return Weights(base.keys(), one)


def _patterns(shape: Shape) -> list[str]:
    """What an adapter may change, as a layout names it: `tokens`, `layers.{i}.qkv`."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", module) for module in adaptable(shape)))


def _merged(checkpoint: Checkpoint, spec: ModelSpec, names: list[str]) -> dict[str, int]:
    told = checkpoint.config.get("task_names") or []
    if not names:
        if spec.repo and len(told) == 1 and not spec.id.endswith(f"-{told[0]}"):
            raise CheckpointError(
                f"{checkpoint.directory} is not '{spec.id}': task_names of its config.json say {told} is merged into it"
            )
        return {}
    if len(told) != 1 or told[0] not in names:
        raise CheckpointError(
            f"{checkpoint.directory} has no {_FOLDER}, so one of {names} is merged into its weights, and task_names of "
            f"its config.json, {told}, does not tell which. If you know, write it there: "
            f'"task_names": ["{names[0]}"]; that task alone is then served'
        )
    return {told[0]: BASE}


def read_adapter(files: Checkpoint, shape: Shape, layout: Mapping[str, Source], placement: Placement) -> Adapter:
    """One adapter of plain LoRA: every tensor of it is used, and every module that it targets is there.

    Queries, keys and values are one module here: an adapter changes all three or none. Of a table PEFT saves other
    names, and both matrices turned round: A as `[rank, rows]`, B as `[dim, rank]`.

    Raises:
        CheckpointError: another kind of adapter, or tensors too few, too many or of other shapes, all listed.
    """
    config = files.json("adapter_config.json")
    rank, scale = read_config(files, config)
    if not isinstance(config.get("target_modules"), list):
        raise CheckpointError(f"{files.directory}/adapter_config.json: target_modules should be a list of names")
    sizes = adaptable(shape)
    parameters: dict[str, tuple[int, ...]] = {}
    sources: dict[str, Source] = {}
    n_blocks: dict[str, int] = {}
    tables: list[str] = []
    for pattern, source in layout.items():
        names = source if isinstance(source, tuple) else (str(source),)
        if not any(f".{name}".endswith(f".{target}") for name in names for target in config["target_modules"]):
            continue
        if pattern in _EMBEDDINGS:
            n_out, n_in = sizes[pattern]
            tables.append(pattern)
            sources[pattern] = source
            parameters |= {f"{pattern}.lora_embedding_A": (rank, n_out), f"{pattern}.lora_embedding_B": (n_in, rank)}
            continue
        sources[f"{pattern}.down"] = tuple(f"{name}.lora_A" for name in names)
        sources |= {f"{pattern}.up{block}": f"{name}.lora_B" for block, name in enumerate(names)}
        for module in {pattern.replace("{i}", str(i)): None for i in range(shape.n_layers)}:
            n_out, n_in = sizes[module]
            widths = shape.qkv_widths if len(names) > 1 else (n_out,)
            parameters[f"{module}.down.weight"] = (len(names) * rank, n_in)
            parameters |= {f"{module}.up{block}.weight": (width, rank) for block, width in enumerate(widths)}
            n_blocks[module] = len(names)
    # The scale is multiplied in before rounding.
    wide = placement if scale == 1 else replace(placement, dtype=torch.float32)
    read = files.read(parameters, sources, wide, prefixes=(_PREFIX,), ignored=_PREFIX + _POOLER)

    def up(name: str) -> Tensor:
        return read[name] if scale == 1 else (read[name] * scale).to(placement.states)

    return {
        table: LowRank(
            read[f"{table}.lora_embedding_B"].T.contiguous().to(placement.states),
            (up(f"{table}.lora_embedding_A").T.contiguous(),),
        )
        for table in tables
    } | {
        module: LowRank(
            read[f"{module}.down.weight"].to(placement.states),
            tuple(up(f"{module}.up{block}.weight") for block in range(n)),
        )
        for module, n in n_blocks.items()
    }


def read_config(files: Checkpoint, config: dict[str, Any]) -> tuple[int, float]:
    """Rank and scale of an `adapter_config.json`.

    Raises:
        CheckpointError: another kind of adapter.
    """
    where = files.directory / "adapter_config.json"
    other = {key: config[key] for key, plain in _PLAIN.items() if (config.get(key) or plain or None) != (plain or None)}
    if other:
        raise CheckpointError(f"{where}: only plain LoRA is served, not {other}")
    rank = int(config["r"])
    return rank, float(config["lora_alpha"]) / rank
