"""A checkpoint directory, read strictly: every tensor is used and every parameter is filled, or the load fails."""

import ctypes
import math
import mmap
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import safe_open
from torch import Tensor

from fundament.backbone.device import Placement, of_a_layer
from fundament.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_MOST_LISTED = 8  # names in an error message
_SMALL_ELEMENTS = 2**18  # below, a tensor is copied: a mapping of its own would cost more than it saves
_BLOCK_ELEMENTS = 2**22  # copied at a time


@dataclass(frozen=True, slots=True)
class Part:
    """The `index`-th of `of` equal slices of a checkpoint tensor along its first dimension."""

    name: str
    index: int
    of: int


Source = str | Part | tuple[str, ...]
"""Where a parameter comes from: a tensor, a slice of one, or several laid one after the other."""


_COUNTS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("dim", "hidden_dim", "n_layers", "n_heads", "d_model", "d_ff", "d_kv", "num_layers", "num_heads"),
}
_NUMBERS = {"layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "rotary_emb_base"}
_IDS = {"pad_token_id"}


class Config(dict[str, Any]):
    """`config.json` or a part of it: a key that a family needs and the file lacks is an error of the checkpoint.

    So is a size that is no whole number above 0, a number that is none above 0, or the id of a token that is no whole
    number from 0 on. One that is null is not told.

    Raises:
        CheckpointError: such a size, number or id.
    """

    def __init__(self, told: Mapping[str, Any], where: str = "config.json") -> None:
        super().__init__(told)
        self.where = where
        for keys, kinds, least, wanted in (
            (_COUNTS, int, 0, "a whole number above 0"),
            (_NUMBERS, int | float, 0, "a number above 0"),
            (_IDS, int, -1, "a whole number, 0 or more"),
        ):
            for key in sorted(keys & self.keys()):
                if (value := self[key]) is None:
                    del self[key]
                elif not isinstance(value, kinds) or isinstance(value, bool) or value <= least:
                    raise CheckpointError(f"{where} says {key} {value!r}; it should be {wanted}")

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.where} does not say {key}")


class Weights(Mapping[str, Tensor]):
    """Parameters by name, each read when it is asked for and not kept.

    A layer that lays its weight out anew lets go of what was read, so memory holds one copy of a model while it loads.
    Those of a layer's products may lie in their file until then; all others are in memory.
    """

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Checkpoint:
    """A directory with `config.json` and safetensors files (one, or shards with an index).

    PyTorch's own format (`pytorch_model.bin`) is read where there is no safetensors file, by the loader that makes
    tensors only. Tensors are mapped, not read, until they are asked for.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[Path, Any] = {}  # safetensors files, for their headers and small tensors
        self._unmapped: set[Path] = set()  # files whose tensors are in memory alone

    @cached_property
    def config(self) -> Config:
        """`config.json`."""
        config = Config(self.json("config.json"), str(self.directory / "config.json"))
        if not isinstance(config.get("architectures") or [], list):
            raise CheckpointError(f"{config.where} should name its architectures in a list")
        if not isinstance(config.get("model_type") or "", str):
            raise CheckpointError(f"{config.where} should name its model_type in a word")
        return config

    def json(self, name: str, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
        """A JSON file of the directory.

        Raises:
            CheckpointError: it is not there (and there is no default), or is not a JSON object.
        """
        path = self.directory / name
        if not path.exists():
            if default is not None:
                return default
            raise CheckpointError(f"{self.directory} has no {name}; is it a model directory?")
        try:
            value = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path} is not a JSON object")
        return value

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Tensor name → the file that holds it."""
        paths = sorted(self.directory.glob("*.safetensors"))
        names: dict[str, Path] = {}
        if not paths:
            for path, tensors in self._pickled.items():
                _add(names, path, tensors)
            return names
        self._check_index({path.name for path in paths})
        for path in paths:
            path.open("rb").close()  # whoever may not read it learns so from the system
            try:
                self._opened[path] = safe_open(path, "pt")
            except Exception as error:
                raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
            _add(names, path, self._opened[path].keys())
        return names

    def _check_index(self, files: set[str]) -> None:
        """Refuse a directory without a file that its index names; where one file holds all, an index says nothing."""
        if "model.safetensors" in files:
            return
        told = self.json(_INDEX, default={}).get("weight_map", {})
        if missing := sorted({str(name) for name in dict(told).values()} - files):
            raise CheckpointError(f"{self.directory} has no {', '.join(missing[:_MOST_LISTED])}, which {_INDEX} names")

    @cached_property
    def _pickled(self) -> dict[Path, dict[str, Tensor]]:
        """The tensors of each file in PyTorch's own format."""
        paths = sorted(self.directory.glob("pytorch_model*.bin"))
        if not paths:
            raise CheckpointError(f"{self.directory} has no .safetensors file and no pytorch_model.bin")
        files = {}
        for path in paths:
            try:
                if not (mapped := zipfile.is_zipfile(path)):  # the older format, which cannot be
                    self._unmapped.add(path)
                files[path] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except Exception as error:
                raise CheckpointError(f"{path} is not a whole file of PyTorch tensors: {error}") from error
            if not isinstance(files[path], dict) or not all(isinstance(t, Tensor) for t in files[path].values()):
                raise CheckpointError(f"{path} holds something else than tensors by name")
        return files

    @property
    def names(self) -> Iterable[str]:
        """The names of all tensors."""
        return self._files.keys()

    @property
    def n_elements(self) -> int:
        """Numbers in all tensors, read from the files' headers."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, bare or behind a prefix."""
        return any(f".{known}".endswith(f".{name}") for known in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        path = self._files[name]
        if path.suffix == ".bin":
            return tuple(self._pickled[path][name].shape)
        return tuple(self._opened[path].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """One tensor: a small one is copied, a large one mapped on its own, so that its pages go when it goes."""
        path = self._files[name]
        if path.suffix == ".bin":
            return self._pickled[path][name]
        if math.prod(self.shape(name)) < _SMALL_ELEMENTS:
            small: Tensor = self._opened[path].get_tensor(name).clone()
            return small
        with safe_open(path, "pt") as file:
            large: Tensor = file.get_tensor(name)
            return large

    def read(
        self,
        parameters: Mapping[str, tuple[int, ...]],
        layout: Mapping[str, Source],
        placement: Placement,
        *,
        prefixes: Iterable[str] = ("",),
        ignored: str = r"(?!)",
    ) -> Weights:
        """Fill every parameter, and use every tensor. All are checked now; each is read when it is asked for.

        Args:
            parameters: parameter name → shape, as the backbone names them: `layers.0.qkv.weight`.
            layout: module name → where it is in the checkpoint, `{i}` standing for the layer:
                `"layers.{i}.qkv": ("encoder.layer.{i}.attention.self.query", …)`. A parameter's own name goes before
                its module's: `"layers.{i}.qkv.weight"` → the whole name of a tensor.
            placement: where the parameters go, and in which number format.
            prefixes: what the names may begin with; the first that fits is taken.
            ignored: a pattern of names that are known and not needed.

        Raises:
            CheckpointError: parameters without a tensor, tensors without a parameter, or other shapes, all listed.
        """
        prefix = self._prefix(prefixes, layout)
        sources = {name: _source(name, layout, prefix) for name in parameters}
        wanted = {name: _tensor_names(source) for name, source in sources.items()}
        used = {tensor for tensors in wanted.values() for tensor in tensors}
        missing = sorted(used - self._files.keys())
        unused = [name for name in self.names if name not in used and not re.fullmatch(ignored, name)]
        if missing or unused:
            raise CheckpointError(
                f"{self.directory} does not fit the model: "
                f"{_listed('not in the checkpoint', missing)}; {_listed('not known to the model', unused)}"
            )
        misfits = [fault for name, shape in parameters.items() if (fault := self._misfit(sources[name], shape))]
        if misfits:
            raise CheckpointError(f"{self.directory} does not fit its config.json: {'; '.join(misfits[:_MOST_LISTED])}")
        return Weights(sources.keys(), partial(self._assemble, sources, placement))

    def _misfit(self, source: Source, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the shapes of a parameter's tensors; None where nothing is."""
        names = _tensor_names(source)
        found = [list(self.shape(name)) for name in names]
        wanted = [shape[0] * source.of if isinstance(source, Part) else shape[0], *shape[1:]]
        alike = all(len(sizes) == len(wanted) and sizes[1:] == wanted[1:] for sizes in found)
        if alike and sum(sizes[0] for sizes in found) == wanted[0]:
            return None
        together = " together" if len(names) > 1 else ""
        return f"{', '.join(names)} should have the shape {wanted}{together}, not {', '.join(map(str, found))}"

    def _prefix(self, prefixes: Iterable[str], layout: Mapping[str, Source]) -> str:
        first = _tensor_names(next(iter(layout.values())))[0]
        candidates = list(prefixes)
        for prefix in candidates:
            if any(name.startswith(f"{prefix}{first}.") for name in self.names):
                return prefix
        return candidates[0]

    def _assemble(self, sources: Mapping[str, Source], placement: Placement, parameter: str) -> Tensor:
        source, device, dtype = sources[parameter], placement.device, placement.dtype_of(parameter)
        match source:
            case str():
                parts = [self.tensor(source)]
            case Part():
                parts = [self.tensor(source.name).chunk(source.of)[source.index]]
            case tuple():
                parts = [self.tensor(name) for name in source]
        if other := [part.dtype for part in parts if not part.is_floating_point()]:
            names = ", ".join(_tensor_names(source))
            raise CheckpointError(f"{names} holds whole numbers ({other[0]}): quantized weights are not served")
        if len(parts) == 1 and parts[0].numel() < _SMALL_ELEMENTS:
            return parts[0].to(device, dtype, copy=True)
        files = {self._files[name] for name in _tensor_names(source)}
        as_wanted = len(parts) == 1 and (parts[0].device, parts[0].dtype) == (device, dtype)
        if as_wanted and of_a_layer(parameter) and not any(file.suffix == ".bin" for file in files):
            return parts[0]  # `Linear` lays it out anew, and its mapping ends; what is kept would change with its file
        return _copy(parts, device, dtype, mapped=not files & self._unmapped)


def _add(names: dict[str, Path], path: Path, found: Iterable[str]) -> None:
    """Note which tensors a file holds; none may be in two."""
    added = dict.fromkeys(found, path)
    if twice := sorted(names.keys() & added):
        raise CheckpointError(
            f"{path} and {names[twice[0]].name} both hold {twice[0]}; take the one away that is not the model's"
        )
    names |= added


def _copy(parts: Sequence[Tensor], device: torch.device, dtype: torch.dtype, *, mapped: bool) -> Tensor:
    """Tensors laid one after the other, in blocks: of mapped ones, a block's pages go before the next is read."""
    made = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), device=device, dtype=dtype)
    done = 0
    for part in parts:
        for block in part.split(max(1, _BLOCK_ELEMENTS * len(part) // max(1, part.numel()))):
            made[done : done + len(block)] = block
            done += len(block)
            if mapped and part.numel() >= _SMALL_ELEMENTS and block.is_contiguous():  # else copied, or not all its own
                _let_go(block)
    return made


def _let_go(mapped: Tensor) -> None:
    """Give a mapped tensor's pages back to the system, which reads them from the file again where they are wanted.

    A file in PyTorch's own format is one mapping: without this, all of it is in memory by the time the last tensor is.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start, page = mapped.data_ptr(), mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + mapped.nbytes) // page * page
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _source(parameter: str, layout: Mapping[str, Source], prefix: str) -> Source:
    module, kind = parameter.rsplit(".", 1)
    layer = re.search(r"\.(\d+)\.", f"{module}.")
    number = layer.group(1) if layer else ""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{i}", module)

    own = layout.get(f"{pattern}.{kind}")

    def full(name: str) -> str:
        ending = f".{kind}" if own is None else ""
        return f"{prefix}{name.replace('{i}', number)}{ending}"

    match layout[pattern] if own is None else own:
        case Part(name, index, of):
            return Part(full(name), index, of)
        case tuple() as names:
            return tuple(full(name) for name in names)
        case name:
            return full(name)


def _tensor_names(source: Source) -> tuple[str, ...]:
    match source:
        case Part():
            return (source.name,)
        case tuple():
            return source
        case _:
            return (source,)


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{what}: {', '.join(sorted(names)[:_MOST_LISTED]) or 'none'}{more}"
