"""The catalogue of public models, and how a name finds its entry."""

from collections.abc import Mapping

from fundament.catalog.entries import CATALOG, EMBEDDED, LISTWISE, PAIRS
from fundament.catalog.spec import Kind, ModelSpec, Score, Task

__all__ = ["CATALOG", "EMBEDDED", "LISTWISE", "PAIRS", "Kind", "ModelSpec", "Score", "Task", "find", "short_id"]

_ALIASES = {alias: spec.id for spec in CATALOG.values() for alias in spec.aliases}


def find(name: str, among: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The model of a name, as it stands or by the short form of it; None where there is none.

    Another owner's model of the same short name is another model than the catalogue's.

    Args:
        name: as callers and operators say it: `jina-embeddings-v3`, `jinaai/jina-embeddings-v3`, a name of one's own.
        among: models by their ids: the catalogue, or those that are served.
    """
    found = among.get(name) or among.get(short_id(name))
    if found is None or name in among or found.id not in CATALOG:
        return found
    owner = name.rpartition("/")[0]
    return found if not owner or _bare(owner) == _bare(found.owner) else None


def _bare(owner: str) -> str:
    return owner.lower().replace("-", "").replace("_", "")


def short_id(model: str) -> str:
    """The catalogue's id of a long one: `jina-ai/jina-embeddings-v3` and `jinaai/…` mean `jina-embeddings-v3`."""
    name = model.rsplit("/", 1)[-1]
    known = _ALIASES.get(name.lower(), name.lower())
    return known if known in CATALOG else name
