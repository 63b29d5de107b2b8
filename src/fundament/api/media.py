"""From what callers send to what a model may read: modalities checked, URLs fetched, base64 decoded."""

import asyncio
from collections.abc import Iterable, Sequence

from fundament.api.body import echo
from fundament.api.inputs import Part, Reference, Sent
from fundament.api.state import State
from fundament.catalog import ModelSpec
from fundament.core import Group, Input, Media, MediaKind, MediaLimits
from fundament.errors import Fault, FetchError, InputError
from fundament.media import sources

_AT_ONCE = 8  # fetches of one request


def check_modalities(state: State, spec: ModelSpec, sent: Sequence[Sent], field: str = "body -> input") -> None:
    """Refuse what the model does not read, with the models served here that do.

    Raises:
        InputError: naming the first input that does not fit.
    """
    for index, value in enumerate(sent):
        missing = sorted({part.kind for part in references([value])}.difference(spec.modalities))
        if isinstance(value, tuple) and (missing or not spec.groups):
            able = [name for name, other in state.served().items() if other.groups]
            what = "groups of parts"
        elif missing:
            able = [name for name, other in state.served().items() if missing[0] in other.modalities]
            what = f"{missing[0]} input"
        else:
            continue
        takes = "text only" if spec.modalities == ("text",) else ", ".join(spec.modalities)
        raise InputError(
            Fault(
                f"{field} -> {index}",
                f"Model '{spec.id}' takes {takes}. Models served here that take {what}: "
                f"{', '.join(sorted(able)) or 'none'}.",
                "modality",
            )
        )


def with_data_uris(spec: ModelSpec, sent: Iterable[Sent], field: str = "body -> input") -> list[Sent]:
    """The inputs, of which a bare data URI is media where the model reads it: a string that is one is never prose."""
    if spec.modalities == ("text",):
        return list(sent)

    def read(value: Sent, origin: str) -> Sent:
        kind = sources.kind_of_data_uri(value) if isinstance(value, str) else None
        return Reference(kind, str(value), origin) if kind in spec.modalities else value

    return [read(value, f"{field} -> {index}") for index, value in enumerate(sent)]


async def opened(state: State, sent: Sequence[Sent]) -> list[Input]:
    """The inputs with their files in memory. What is there twice is fetched once.

    Raises:
        InputError: too many files, or too large ones, or one that cannot be fetched or is not base64.
    """
    found = references(sent)
    if not found:
        return [value for value in sent if isinstance(value, str)]
    settings = state.settings
    if len(found) > (most := settings.max_media):
        message = f"A request may have {most} images and other files, not {len(found)}. Send several requests."
        raise InputError(Fault("body -> input", message, "too_long", echo(found)))
    limits, budget = limits_of(state), Budget(int(settings.max_media_mb * 1e6))
    distinct = {(each.kind, each.source): each for each in reversed(found)}
    gate = asyncio.Semaphore(_AT_ONCE)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {
                key: group.create_task(_content(state, reference, max_bytes(limits, reference.kind), budget, gate))
                for key, reference in distinct.items()
            }
    except* InputError as errors:
        raise first_of(errors) from None
    contents = {key: task.result() for key, task in tasks.items()}

    def read(part: Part) -> str | Media:
        if isinstance(part, str):
            return part
        return Media(part.kind, contents[part.kind, part.source], part.origin, limits)

    return [Group([read(part) for part in value]) if isinstance(value, tuple) else read(value) for value in sent]
