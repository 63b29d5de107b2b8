"""`--alias NAME=MODEL`: names of served models for clients whose model name cannot be changed."""

from collections.abc import Iterable, Mapping

from fundament.catalog import CATALOG, ModelSpec, find, short_id
from fundament.errors import FundamentError


def read_aliases(arguments: Iterable[str], served: Mapping[str, ModelSpec]) -> dict[str, str]:
    """Read `--alias NAME=MODEL`: NAME to the id of the served model that it stands for.

    Raises:
        FundamentError: an alias of no served model, or with the name of one, or given twice.
    """
    aliases: dict[str, str] = {}
    for argument in arguments:
        name, _, target = (part.strip() for part in argument.partition("="))
        if not name or not target:
            raise FundamentError(f"--alias {argument}: write NAME=MODEL, as in --alias my-model={min(served)}")
        name = short_id(name) if short_id(name) in CATALOG else name
        if find(name, served) is not None:
            raise FundamentError(f"--alias {argument}: '{name}' is itself a served model; choose another name")
        if name in aliases:
            raise FundamentError(f"--alias {argument}: '{name}' is already an alias of '{aliases[name]}'; keep one")
        spec = find(target, served)
        if spec is None:
            raise FundamentError(
                f"--alias {argument}: '{target}' is not served, so nothing could answer; "
                f"served are {', '.join(sorted(served))}. Add it: --model {target}"
            )
        aliases[name] = spec.id
    return aliases
