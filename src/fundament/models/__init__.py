"""One file per family. A catalogue entry names its family; the module of that name has `load` and `recognises`.

One whose models keep what they have read has `kept_bytes` too: how many bytes of it a model of that entry may keep.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, Protocol, cast

from fundament.catalog import ModelSpec
from fundament.core import Model

# The names of the families are listed without loading torch: a family does that when it is asked for.
if TYPE_CHECKING:
    from fundament.backbone.checkpoint import Checkpoint
    from fundament.backbone.device import Placement

PROGRAM = "torchscript"
"""The family whose weights are a program: it has no `config.json` to be known by, and loading runs it."""


class Family(Protocol):
    """What a module of this package offers."""

    def recognises(self, config: dict[str, Any]) -> bool:
        """Whether a `config.json` is of this family."""
        ...

    def load(self, checkpoint: "Checkpoint", spec: ModelSpec, placement: "Placement") -> Model[Any, Any]:
        """Load a checkpoint, strictly.

        Raises:
            CheckpointError: it does not fit.
        """
        ...


def kept_bytes(spec: ModelSpec) -> int:
    """Memory that a model may fill with what it has read, beside its weights, where its family keeps such a thing."""
    keeps = getattr(family(spec.family), "kept_bytes", None)
    return int(keeps(spec)) if keeps else 0


def families() -> list[str]:
    """The names of all families."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def family(name: str) -> Family:
    """The family of that name."""
    return cast("Family", importlib.import_module(f"{__name__}.{name}"))


def family_of(config: dict[str, Any]) -> str | None:
    """The family that a `config.json` belongs to, or None."""
    return next((name for name in families() if family(name).recognises(config)), None)
