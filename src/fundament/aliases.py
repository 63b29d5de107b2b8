"""`--alias NAME=MODEL`: names of served models for clients whose model name, or task, cannot be chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fundament.catalog import CATALOG, ModelSpec, find, short_id
from fundament.errors import FundamentError


@dataclass(frozen=True, slots=True)
class Alias:
    """What a name stands for: the id of a served model, and the task of embeddings where the caller names none."""

    model: str
    task: str | None = None

    def __str__(self) -> str:
        """As an operator writes it."""
        return f"{self.model}:{self.task}" if self.task else self.model


def read_aliases(arguments: Iterable[str], served: Mapping[str, ModelSpec]) -> dict[str, Alias]:
    """Read `--alias NAME=MODEL` and `--alias NAME=MODEL:TASK`.

    Raises:
        FundamentError: an alias of no served model or of a task that it lacks, or with the name of one, or given twice.
    """
    aliases: dict[str, Alias] = {}
    for argument in arguments:
        name, _, target = (part.strip() for part in argument.partition("="))
        if not name or not target:
            raise FundamentError(f"--alias {argument}: write NAME=MODEL, as in --alias my-model={min(served)}")
        name = short_id(name) if short_id(name) in CATALOG else name
        if find(name, served) is not None:
            raise FundamentError(f"--alias {argument}: '{name}' is itself a served model; choose another name")
        if name in aliases:
            raise FundamentError(f"--alias {argument}: '{name}' is already an alias of '{aliases[name]}'; keep one")
        model, _, task = (target, "", "") if find(target, served) else target.rpartition(":")
        spec = find(model, served)
        if spec is None:
            raise FundamentError(
                f"--alias {argument}: '{target}' is not served, so nothing could answer; "
                f"served are {', '.join(sorted(served))}. Add it: --model {target}"
            )
        if task and task not in spec.tasks:
            tasks = ", ".join(spec.tasks) or "none"
            raise FundamentError(f"--alias {argument}: the tasks of '{spec.id}' are {tasks}, not '{task}'")
        aliases[name] = Alias(spec.id, task or None)
    return aliases
