"""What a directory of the operator's own is served as: its files say it, or why it is not served."""

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from fundament.backbone import colbert
from fundament.backbone.adapters import adapters_of, has_adapters
from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.classifier_head import is_classifier
from fundament.backbone.dense import read_dim
from fundament.backbone.sentence import (
    PROMPTS,
    is_pooled,
    known_by,
    list_modules,
    read_context,
    read_modules,
    read_prompts,
)
from fundament.backbone.token_heads import has_heads
from fundament.backbone.unserved import refuse_turned, refuse_unserved
from fundament.catalog import CATALOG, LISTWISE, PAIRS, ModelSpec, Score, Task
from fundament.core import Output
from fundament.errors import CheckpointError
from fundament.models import PROGRAM, families, family_of, listwise
from fundament.models.torchscript import read_tokenizer

_OWN = "A directory of the operator's own."  # what is said of a model that is in no catalogue
_ELSER = "elser-v2"  # the model that is published as a program

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


def read_own(name: str, directory: Path) -> ModelSpec:
    """The entry that a directory with a `config.json` would have in the catalogue under that name.

    Raises:
        CheckpointError: it is of no known family, or something in it would change vectors or scores and is not served.
    """
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
        description=_OWN,
        released=changed,
        licence="unknown",
        context=read_context(checkpoint),
        dim=dim,
        outputs=outputs,
        tasks={task: Task(prompt) for task, prompt in prompts.items()},
        default_task=default,
        **ranks,
    )


def check_entry(spec: ModelSpec, directory: Path) -> None:
    """Refuse a directory under an id of the catalogue whose files say that it is another model.

    What it takes and gives, the catalogue's entry says; what comes between, they do.

    Raises:
        CheckpointError: it has layers that the catalogue's model has not, or reads texts otherwise.
    """
    checkpoint = Checkpoint(directory)
    if spec.kind == "embedding" and spec.outputs[0] != "multi":  # those of rerankers say what the entry says
        _refuse_other_modules(checkpoint, _SERVED_DENSE_MODULES | _SERVED_SPARSE_MODULES, of_its_own=True)
    refuse_turned(checkpoint)


def _unknown(checkpoint: Checkpoint) -> str:
    """That a checkpoint is of no family, and which of its settings is in the way where one is."""
    config, kind = checkpoint.config, known_by(checkpoint)
    model_type, positions = config.get("model_type"), config.get("position_embedding_type")
    why = f"Known are {', '.join(families())}"
    if positions and family_of({**kind, "position_embedding_type": "absolute"}):
        why = f"What is not served is its position_embedding_type '{positions}'"
    return (
        f"{checkpoint.directory} is of no known family: config.json says model_type '{model_type}', architectures "
        f"{config.get('architectures')}. {why}"
    )


def instead(directory: Path, needed: str) -> str:
    """What a directory is that lacks a file of a model, and the way out, as the end of a sentence."""
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


def _refuse_without_entry(name: str, family: str, checkpoint: Checkpoint) -> None:
    """Tasks, outputs and what a model reads besides texts are in its entry; no file of the checkpoint says them."""
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


def _outputs(checkpoint: Checkpoint, family: str) -> tuple[tuple[Output, ...], int | None]:
    """What a directory's model makes of an input, and of how many numbers: its files say it."""
    if colbert.is_colbert(checkpoint.config):
        return ("multi",), colbert.read_dim(checkpoint)
    if family == "listwise":
        return ("dense",), listwise.read_dim(checkpoint)
    if family == "splade":
        return ("sparse",), checkpoint.config.get("vocab_size")
    sizes = (checkpoint.config.get(key) for key in ("hidden_size", "d_model", "dim"))
    dim = read_dim(checkpoint, next(filter(None, sizes), None))
    return ("dense", "sparse", "multi") if has_heads(checkpoint) else ("dense",), dim


def _read_similarity(checkpoint: Checkpoint, output: Output) -> Score | None:
    """How the model's vectors are compared, as `config_sentence_transformers.json` says; None where it does not.

    Raises:
        CheckpointError: in a way that is not served.
    """
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


def read_program(argument: str, spec: ModelSpec | None, name: str, program: Path) -> ModelSpec:
    """The entry of a TorchScript file, whose vocabulary lies beside it.

    Raises:
        CheckpointError: the catalogue's model of that name is no such program, or the vocabulary cannot be read.
    """
    if spec is not None and spec.id != _ELSER:
        raise CheckpointError(
            f"--model {argument}: {program.name} is TorchScript, which is served as {_ELSER} "
            "or under a name of your own"
        )
    elser = CATALOG[_ELSER]
    changed = datetime.fromtimestamp(program.stat().st_mtime, UTC).date()
    own = replace(elser, id=name, name=name, description=_OWN, released=changed, licence="unknown", n_parameters=0)
    own = replace(own, dotless=False, counts_output=False)  # its answers have the forms of every other model's
    dim = read_tokenizer(program.parent, elser.context).n_vocab
    return replace(spec or own, family=PROGRAM, dim=dim)


def _refuse_other_modules(checkpoint: Checkpoint, served: set[str], *, of_its_own: bool = False) -> None:
    """A sentence encoder's `modules.json` may name layers behind the pooling; without them its vectors are wrong.

    Args:
        checkpoint: where it is.
        served: kinds of modules.
        of_its_own: let modules pass whose code is the model's own, as some of the catalogue's have.
    """
    listed = list_modules(checkpoint)
    modules = {
        module.kind: module.folder
        for module in listed
        if not of_its_own or module.type.startswith("sentence_transformers.")
    }
    if folder := _folder_of_model(modules):
        raise CheckpointError(f"{checkpoint.directory}/modules.json says that {folder}")
    if other := modules.keys() - served:
        raise CheckpointError(
            f"{checkpoint.directory}/modules.json names modules that are not served: {', '.join(sorted(other))}"
        )
