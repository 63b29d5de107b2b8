"""The adapters of jina-embeddings-v4: for each task one, of every linear layer of its language model and of a head.

All tasks lie in one file, `….lora_A.TASK.weight`, or each in a folder of its own. Which names go before `layers` is not
settled, so only what follows is read; every tensor must be known and every one must be there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fundament.backbone.adapters import read_config
from fundament.backbone.checkpoint import Checkpoint, Source
from fundament.backbone.device import Placement
from fundament.backbone.linear import LowRank
from fundament.backbone.transformer import Adapter, Shape, adaptable
from fundament.errors import CheckpointError

_FOLDER, _FILE = "adapters", "adapter_model.safetensors"
_MOST_LISTED = 8  # names in an error message


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of an adapter, in the file that has it."""

    files: Checkpoint
    name: str


@dataclass(frozen=True, slots=True)
class TaskAdapters:
    """What each task adds, in the order that was asked for: to the transformer, and to the head."""

    layers: Sequence[Adapter]
    head: Sequence[LowRank]


def read_task_adapters(
    checkpoint: Checkpoint,
    tasks: Sequence[str],
    shape: Shape,
    layout: Mapping[str, Source],
    head: tuple[str, tuple[int, int]],
    placement: Placement,
) -> TaskAdapters:
    """The adapters of all tasks.

    Args:
        checkpoint: the base weights' own.
        tasks: their names.
        shape: of the language model.
        layout: of its base weights.
        head: the name of the linear layer beside it, and its weight's shape.
        placement: where the adapters go.

    Raises:
        CheckpointError: adapters that are not there or not plain LoRA, or tensors too few, too many or of other shapes.
    """
    sources = _sources(shape, layout)
    stems = [stem for parts in sources.values() for stem in parts] + [head[0]]
    found, scale, rank = _find(checkpoint, tasks, stems)
    wanted = {(task, stem, side) for task in tasks for stem in stems for side in "AB"}
    if missing := sorted(wanted - found.keys()):
        listed = ", ".join(f"{stem}.lora_{side} of {task}" for task, stem, side in missing[:_MOST_LISTED])
        raise CheckpointError(f"{checkpoint.directory / _FOLDER} lacks {len(missing)} tensors: {listed}")

    def read(task: str, stem: str, side: str, size: tuple[int, int]) -> Tensor:
        part = found[task, stem, side]
        if (shaped := part.files.shape(part.name)) != size:
            raise CheckpointError(
                f"{part.files.directory}: {part.name} should have the shape {list(size)}, not {list(shaped)}"
            )
        tensor = part.files.tensor(part.name).to(placement.device, torch.float32)
        return (tensor * scale if side == "B" else tensor).to(placement.states)

    def low_rank(task: str, parts: Sequence[str], widths: Sequence[int], n_in: int) -> LowRank:
        downs = [read(task, stem, "A", (rank, n_in)) for stem in parts]
        ups = [read(task, stem, "B", (width, rank)) for stem, width in zip(parts, widths, strict=True)]
        return LowRank(torch.cat(downs), tuple(ups))

    layers = []
    for task in tasks:
        adapter = {}
        for module, parts in sources.items():
            n_out, n_in = adaptable(shape)[module]
            adapter[module] = low_rank(task, parts, shape.qkv_widths if len(parts) > 1 else (n_out,), n_in)
        layers.append(adapter)
    n_out, n_in = head[1]
    return TaskAdapters(layers, [low_rank(task, [head[0]], [n_out], n_in) for task in tasks])


def _sources(shape: Shape, layout: Mapping[str, Source]) -> dict[str, tuple[str, ...]]:
    """Each linear layer of the transformer → the names of what it is made of."""
    found = {}
    for module in adaptable(shape):
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", module)
        number = re.search(r"\.(\d+)\.", module)
        if number is not None:
            source = layout[pattern]
            names = source if isinstance(source, tuple) else (str(source),)
            found[module] = tuple(name.replace("{i}", number.group(1)) for name in names)
    return found


def _find(
    checkpoint: Checkpoint, tasks: Sequence[str], stems: Sequence[str]
) -> tuple[dict[tuple[str, str, str], _Part], float, int]:
    """Task, stem and side → its tensor; and the scale and the rank of all of them."""
    folder = checkpoint.directory / _FOLDER
    together = (folder / _FILE).exists()
    folders = {"": folder} if together else {task: folder / task for task in tasks}
    if absent := [str(path) for path in folders.values() if not (path / _FILE).exists()]:
        raise CheckpointError(f"there is no {_FILE} in {', '.join(absent)}; get the whole repository")
    named = "|".join(map(re.escape, tasks))
    pattern = re.compile(
        rf"(?:.*\.)?({'|'.join(map(re.escape, stems))})\.lora_([AB])(?:\.default)?(?:\.({named}))?\.weight"
    )
    found: dict[tuple[str, str, str], _Part] = {}
    settings = set()
    unknown = []
    for owner, path in folders.items():
        files = Checkpoint(path)
        rank, scale = read_config(files, files.json("adapter_config.json"))
        settings.add((scale, rank))
        for name in files.names:
            match = pattern.fullmatch(name)
            task = (match[3] or owner) if match else ""
            if match is None or not task or (task, match[1], match[2]) in found:
                unknown.append(name)
            else:
                found[task, match[1], match[2]] = _Part(files, name)
    if unknown:
        listed = ", ".join(sorted(unknown)[:_MOST_LISTED])
        raise CheckpointError(f"{folder} has {len(unknown)} tensors that the model does not know: {listed}")
    if len(settings) != 1:
        raise CheckpointError(f"{folder}: tasks differ in rank or scale: {sorted(settings)}")
    [(scale, rank)] = settings
    return found, scale, rank
