"""Calls whose inputs are texts and media in any order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fundament.core import Array, Embed, Group, Input, Item, Media
from fundament.errors import Fault, InputError


def rows_in_order(
    call: Embed, read_texts: Callable[[Mapping[int, str]], list[Item]], read_media: Callable[[Media], list[Item]]
) -> list[Item]:
    """The rows of a call's inputs, in their order. A file that is there twice gives the same rows twice.

    Args:
        call: what is asked.
        read_texts: one row per text, given by their places in the call.
        read_media: the rows of a file, one per picture.

    Raises:
        InputError: an input that is several parts, or one that a reader refuses.
    """
    room = Room()
    texts = {place: value for place, value in enumerate(call.inputs) if isinstance(value, str)}
    read_before: dict[Media, list[Item]] = {}
    rows = {place: [row] for place, row in zip(texts, read_texts(texts) if texts else [], strict=True)}
    for place, value in enumerate(call.inputs):
        match value:
            case Media():
                if value not in read_before:
                    read_before[value] = room.taken(value, read_media(value))
                rows[place] = read_before[value]
            case str():
                pass
            case _:
                message = "This model makes a vector of each input; it cannot make one of several parts."
                raise InputError(Fault(f"body -> input -> {place}", message))
    return [row for place in range(len(call.inputs)) for row in rows[place]]


class Room:
    """The memory that rows of one call's files may take: small files become large rows, and a body holds many."""

    def __init__(self) -> None:
        self._arrays: dict[int, Array] = {}  # several rows may share one
        self._n_bytes = 0

    def taken(self, value: Input, rows: list[Item]) -> list[Item]:
        """The rows of an input, which are counted where it has files.

        Raises:
            InputError: there is no room for them.
        """
        parts = value.parts if isinstance(value, Group) else [value]
        if (file := next((part for part in parts if isinstance(part, Media)), None)) is None:
            return rows
        for array in (array for row in rows for array in row.features.values()):
            if id(array) not in self._arrays:
                self._arrays[id(array)] = array
                self._n_bytes += array.nbytes
        if self._n_bytes > (most := file.limits.call_bytes):
            message = f"The files up to this one take more than {most / 1e6:,g} MB decoded. Send several requests."
            raise InputError(Fault(file.origin, message, "media"))
        return rows


def count_all(rows: Sequence[Item]) -> list[Item]:
    """Rows whose prompts count as the caller's tokens do: so the hosted API counts for models that read images."""
    return [replace(row, n_counted=len(row.features["ids"])) for row in rows]
