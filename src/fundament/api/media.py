"""From what callers send to what a model may read: modalities checked, URLs fetched, base64 decoded."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

from fundament.accounts.visits import current_visit
from fundament.api.body import echo
from fundament.api.inputs import Part, Reference, Sent
from fundament.api.state import State
from fundament.catalog import ModelSpec
from fundament.core import Group, Input, Interest, Media, MediaLimits
from fundament.errors import Fault, FetchError, InputError, UnavailableError
from fundament.media import sources

_AT_ONCE = 16  # files of one caller that are fetched or decoded from base64
_GROUPS = "groups of parts"


def read_bare(spec: ModelSpec, sent: Sequence[Sent]) -> list[Sent]:
    """The inputs, where a bare string that is a data URI is the media that it holds, if the model reads such media."""
    if spec.modalities == ("text",):
        return [*sent]
    return [read_bare_input(spec, value, f"body -> input -> {index}") for index, value in enumerate(sent)]


def read_bare_input(spec: ModelSpec, value: Sent, origin: str) -> Sent:
    """The same of one input, which is at `origin` in the request."""
    if isinstance(value, str) and (kind := sources.kind_of_data_uri(value)) and kind in spec.modalities:
        return Reference(kind, value, origin)
    return value


def check_media(state: State, spec: ModelSpec, sent: Sequence[Sent], *, pages: bool = True) -> None:
    """Refuse what the model does not read, naming those of its kind served here that do, and a PDF in company.

    Args:
        state: the application's parts.
        spec: the model.
        sent: every input.
        pages: whether one input may become several, as a PDF does.

    Raises:
        InputError: naming the first input that does not fit.
    """
    for index, value in enumerate(sent):
        if isinstance(value, str):  # every model reads texts
            continue
        missing = sorted({part.kind for part in references([value])}.difference(spec.modalities))
        if isinstance(value, tuple) and (missing or not spec.groups):
            refused = _GROUPS
        elif missing:
            refused = f"{missing[0]} input"
        elif isinstance(value, Reference) and value.kind == "pdf" and (len(sent) > 1 or not pages):
            way_out = "Send it alone, as the whole input." if pages else "Send its pages as images."
            message = f"A PDF becomes one vector per page. {way_out}"
            raise InputError(Fault(f"body -> input -> {index}", message))
        else:
            continue
        able = state.able(partial(_takes, kind=spec.kind, what=refused if refused == _GROUPS else missing[0]))
        raise InputError(
            Fault(
                f"body -> input -> {index}",
                f"Model '{spec.id}' takes {_listed(spec)}. Models served here that take {refused}: {able}.",
                "modality",
            )
        )


def _takes(spec: ModelSpec, kind: str, what: str) -> bool:
    return spec.kind == kind and (spec.groups if what == _GROUPS else what in spec.modalities)


def _listed(spec: ModelSpec) -> str:
    return "text only" if spec.modalities == ("text",) else f"{', '.join(spec.modalities)}, each on its own"


@asynccontextmanager
async def opened(
    state: State, sent: Sequence[Sent], field: str = "body -> input", *, caller: str = ""
) -> AsyncIterator[list[Input]]:
    """The inputs with their files in memory, until the block ends. A file that is named twice is read once.

    A caller's files wait for each other, whatever requests name them, so that slow ones hold up nobody else's.

    Args:
        state: the application's parts.
        sent: every input.
        field: where they are in the request.
        caller: who asks, where that is not the request that runs.

    Raises:
        InputError: too many files, or too large ones, or one that cannot be fetched or is not base64.
        UnavailableError: the files of all requests take as much memory as they may.
    """
    if all(isinstance(value, str) for value in sent):
        yield cast("list[Input]", sent)
        return
    found, settings, limits = references(sent), state.settings, media_limits(state)
    interest = Interest()
    if len(found) > (most := settings.max_media):
        message = f"A request may hold {most} images and other files, not {len(found)}. Send several requests."
        raise InputError(Fault(field, message, "too_long", echo(found)))
    visit = current_visit.get()
    who = caller or (visit.caller.id if visit else "")
    gate = state.gates.setdefault(who, asyncio.Semaphore(_AT_ONCE))
    n_bytes = 0

    async def content(reference: Reference) -> bytes:
        nonlocal n_bytes
        async with gate:
            read = await _read(state, reference, limits.max_bytes(reference.kind))
        n_bytes += len(read)
        state.n_file_bytes += len(read)
        if n_bytes > settings.max_media_mb * 1_000_000:
            message = f"Together these files are larger than the {settings.max_media_mb:g} MB that a request may hold."
            raise InputError(Fault(field, f"{message} Send several requests.", "media"))
        if state.n_file_bytes > max(n_bytes, settings.max_all_media_mb * 1_000_000):
            raise UnavailableError("Too many images and other files are being read. Try again shortly.")
        return read

    distinct = {(each.kind, each.source): each for each in reversed(found)}
    try:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {key: group.create_task(content(each)) for key, each in distinct.items()}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

        def part_of(part: Part) -> str | Media:
            if isinstance(part, str):
                return part
            return Media(part.kind, tasks[part.kind, part.source].result(), part.origin, limits, interest)

        yield [
            Group([part_of(part) for part in value]) if isinstance(value, tuple) else part_of(value) for value in sent
        ]
    finally:
        interest.lose()  # a file that is still being decoded is nobody's: the client has gone
        state.n_file_bytes -= n_bytes


def references(sent: Iterable[Sent]) -> list[Reference]:
    """Every file that is named, in order."""
    parts = (part for value in sent for part in (value if isinstance(value, tuple) else (value,)))
    return [part for part in parts if isinstance(part, Reference)]


def media_limits(state: State) -> MediaLimits:
    """What the operator lets a file be."""
    settings = state.settings
    return MediaLimits(
        image_bytes=int(settings.max_image_mb * 1_000_000),
        recording_bytes=int(settings.max_recording_mb * 1_000_000),
        image_pixels=int(settings.max_image_megapixels * 1_000_000),
        pdf_pages=settings.max_pdf_pages,
        seconds=settings.max_recording_seconds,
        video_frames=settings.max_video_frames,
        video_pixels=int(settings.max_video_megapixels * 1_000_000),
        call_bytes=int(settings.max_waiting_mb * 1_000_000),
    )


async def _read(state: State, reference: Reference, max_bytes: int) -> bytes:
    if not sources.is_url(reference.source):
        return await asyncio.to_thread(sources.read, reference.source, reference.origin, max_bytes)
    try:
        return await state.fetcher.fetch(reference.source.strip(), max_bytes=max_bytes)
    except FetchError as error:
        raise InputError(Fault(reference.origin, error.detail, "media")) from error
