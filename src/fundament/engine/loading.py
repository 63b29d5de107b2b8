"""Loading a model, and the memory that it takes."""

import math
import re
from typing import Any

from fundament.backbone.checkpoint import Checkpoint
from fundament.backbone.device import Placement
from fundament.backbone.sentence import known_by
from fundament.catalog import ModelSpec
from fundament.core import Model
from fundament.engine.weights import Local, reading
from fundament.errors import CheckpointError
from fundament.models import PROGRAM, Family, family, family_of, kept_bytes


def load_model(local: Local, placement: Placement) -> Model[Any, Any]:
    """Load a model from its directory, strictly.

    Raises:
        CheckpointError: the checkpoint is of another family, or does not fit its own; it says which directory.
    """
    checkpoint, directory = Checkpoint(local.directory), str(local.directory)
    try:
        with reading():
            return family_for(checkpoint, local.spec).load(checkpoint, local.spec, placement)
    except CheckpointError as error:
        if directory in error.detail:
            raise
        raise CheckpointError(f"{directory}: {error.detail}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory} cannot be loaded; is one of its settings wrong? {error!r}") from error


def family_for(checkpoint: Checkpoint, spec: ModelSpec) -> Family:
    """The family that loads a model, whose checkpoint must be one of it.

    Raises:
        CheckpointError: the checkpoint is of another family.
    """
    its_own = family(spec.family)
    if spec.family == PROGRAM:  # it has no config.json to be known by: the operator said what it is
        return its_own
    if its_own.recognises(config := known_by(checkpoint)):
        return its_own
    told = (
        f"{checkpoint.directory} is not of family {spec.family} as '{spec.id}' is: config.json says model_type "
        f"'{config.get('model_type')}', architectures {checkpoint.config.get('architectures')}"
    )
    if other := family_of(config):
        raise CheckpointError(
            f"{told}; that is family {other}. Serve it under a name of its own: --model NAME={checkpoint.directory}"
        )
    raise CheckpointError(f"{told}; that is no family known here. Give the directory of '{spec.id}' itself")


def needed_bytes(local: Local, placement: Placement) -> int:
    """Memory that a model's weights take once they are loaded, adapters included, by the headers of its files.

    Raises:
        CheckpointError: files that cannot be read.
    """
    if local.spec.family == PROGRAM:  # it keeps its own number format
        return local.n_bytes
    adapters = sum(Checkpoint(path.parent).n_elements for path in local.directory.glob("*/**/adapter_config.json"))
    checkpoint = Checkpoint(local.directory)
    sizes = [(name, checkpoint.shape(name)) for name in checkpoint.names]
    n_matrices = sum(math.prod(shape) for name, shape in sizes if _in_a_layer(name, shape))
    n_others = checkpoint.n_elements - n_matrices + adapters
    return placement.dtype.itemsize * n_matrices + placement.states.itemsize * n_others


def _in_a_layer(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a checkpoint's tensor is a matrix of one of its layers: those are numbered."""
    return len(shape) == 2 and re.search(r"\.\d+\.", tensor) is not None


def most_bytes(local: Local, placement: Placement, cache_bytes: int) -> int:
    """Memory that a model may come to take: its weights, and what it keeps of what it has read.

    Args:
        local: the model.
        placement: where it runs.
        cache_bytes: the keys and values of a chat model's conversations.

    Raises:
        CheckpointError: files that cannot be read.
    """
    n_bytes = needed_bytes(local, placement) + kept_bytes(local.spec)
    return n_bytes + cache_bytes if local.spec.kind == "chat" else n_bytes
