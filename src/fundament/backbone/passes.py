"""How rows that share beginnings lie in a pass: end to end, in slices, each row's keys behind those of its prefix."""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.packed import rounded
from fundament.core import Array, Item

CPU_SLICE_TOKENS = 2048
CUDA_SLICE_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens that a row shares with others, its own, and where among its own a state is asked for.

    Attributes:
        prefix: int64 `[shared]`; empty where it shares nothing.
        ids: int64 `[own]`, one at least.
        kept: int64 `[asked]`, ascending places in `ids`.
    """

    prefix: Array
    ids: Array
    kept: Array

    @classmethod
    def of(cls, item: Item) -> "Row":
        """The row that an item's features hold."""
        return cls(item.features["prefix"], item.features["ids"], item.features["kept"])

    @property
    def features(self) -> dict[str, Array]:
        """The row as features of an item."""
        return {"prefix": self.prefix, "ids": self.ids, "kept": self.kept}


def share(rows: Sequence[Array], kept: Sequence[Array], most: int) -> list[Row]:
    """Rows whose common beginning is their prefix, where there are several.

    Args:
        rows: token ids of each.
        kept: places of each whose states are asked for; none of them is shared.
        most: tokens of the longest prefix.
    """
    n = 0
    if len(rows) > 1:
        n = min(most, *(int(places[0]) for places in kept))
        for row in rows[1:]:
            differing = np.flatnonzero(rows[0][:n] != row[:n])
            n = int(differing[0]) if len(differing) else n
    return [Row(row[:n], row[n:], places - n) for row, places in zip(rows, kept, strict=True)]


def share_alike(rows: Sequence[Array], kept: Sequence[Array], most: int, kinds: Sequence[int]) -> list[Row]:
    """As `share`, of the rows of each kind apart; those that are the only one of theirs share with one another.

    Args:
        rows: token ids of each.
        kept: places of each whose states are asked for.
        most: tokens of the longest prefix.
        kinds: of each row; those of one kind begin alike for longer.
    """
    n_of_kind = Counter(kinds)
    groups: dict[int | None, list[int]] = {}
    for place, kind in enumerate(kinds):
        groups.setdefault(kind if n_of_kind[kind] > 1 else None, []).append(place)
    found: dict[int, Row] = {}
    for places in groups.values():
        shared = share([rows[place] for place in places], [kept[place] for place in places], most)
        found.update(zip(places, shared, strict=True))
    return [found[place] for place in range(len(rows))]


def costs(rows: Sequence[Row]) -> list[int]:
    """How many tokens each of a call's rows costs: a prefix runs once, for the first that names it."""
    prefixes: set[bytes] = set()
    found = []
    for row in rows:
        key = row.prefix.tobytes()
        found.append(len(row.ids) + (0 if key in prefixes else len(row.prefix)))
        prefixes.add(key)
    return found


@dataclass(frozen=True, slots=True)
class Fill:
    """Keys of a prefix that are copied before those of the rows that share it.

    Attributes:
        kept: keys and values, `[layers, 2, shared, kv_heads, head_dim]`; None where the prefix runs in the same pass.
        source: where its keys lie, in that case.
        targets: where they are wanted, `[rows, shared]`.
    """

    kept: Tensor | None
    source: slice | None
    targets: Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one row in a slice.

    Attributes:
        start: its first token, counted from the slice's first.
        stop: one past its last.
        key_start: where the keys of its row begin, in the pass, with those of the prefix.
        key_stop: one past the key of its last token.
        fill: what must be copied before it can attend.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int
    fill: Fill | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring tokens of a pass that a layer runs over together.

    Attributes:
        tokens: which; on a CPU the last may be of no row, so that there are few shapes.
        pieces: the rows, or parts of rows, that it holds; their keys too are neighbours.
        kept: which of its tokens' states are asked for.
        asked: those tokens as pieces, each counted from the first of them.
        offsets: where each piece starts, and the end, int32 `[pieces + 1]`.
        key_offsets: the same of their keys, counted from the first piece's first.
        longest: tokens of the longest piece.
        key_longest: most keys of a piece.
    """

    tokens: slice
    pieces: tuple[Piece, ...]
    kept: Tensor
    asked: tuple[Piece, ...]
    offsets: Tensor
    key_offsets: Tensor
    longest: int
    key_longest: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that run together: first the prefixes whose keys are not kept, as rows, then the others.

    Attributes:
        ids: token ids, `[tokens]`.
        positions: each token's place in its row, the prefix counted, `[tokens]`.
        places: where each token's key goes, `[tokens]`; tokens of no row share the place behind all others.
        n_keys: keys of all rows, with those of their prefixes.
        slices: the tokens, in parts.
        new: prefixes that run here: their ids and where their keys lie.
    """

    ids: Tensor
    positions: Tensor
    places: Tensor
    n_keys: int
    slices: tuple[Slice, ...]
    new: tuple[tuple[Array, slice], ...]


def lay(rows: Sequence[Row], kept: Mapping[bytes, Tensor], device: torch.device) -> Pass:
    """Lay rows end to end.

    Args:
        rows: in that order.
        kept: keys and values of prefixes that need not run, by the bytes of their ids.
        device: where the pass goes.
    """
    none = np.zeros(0, dtype=np.int64)
    prefixes = {row.prefix.tobytes(): row.prefix for row in rows if len(row.prefix)}
    new = {key: prefix for key, prefix in prefixes.items() if key not in kept}
    laid = [*(Row(none, prefix, none) for prefix in new.values()), *rows]
    tokens = _borders([len(row.ids) for row in laid])
    keys = _borders([len(row.prefix) + len(row.ids) for row in laid])
    sources = {key: slice(keys[row], keys[row + 1]) for row, key in enumerate(new)}

    fills: dict[int, Fill] = {}  # by the first row that needs one
    sharing: dict[bytes, list[int]] = {}
    for place, row in enumerate(laid):
        sharing.setdefault(row.prefix.tobytes(), []).append(place)
    for key, prefix in prefixes.items():
        targets = np.array([keys[place] for place in sharing[key]])[:, None] + np.arange(len(prefix))
        fills[sharing[key][0]] = Fill(kept.get(key), sources.get(key), torch.from_numpy(targets).to(device))

    size = CPU_SLICE_TOKENS if device.type == "cpu" else CUDA_SLICE_TOKENS
    n_last = tokens[-1] % size
    n_more = rounded(n_last) - n_last if device.type == "cpu" else 0
    positions = [np.arange(len(row.prefix), len(row.prefix) + len(row.ids)) for row in laid]
    arrays = (
        [row.ids for row in laid] + [np.zeros(n_more)],
        [*positions, np.zeros(n_more)],
        [start + place for start, place in zip(keys, positions, strict=False)] + [np.full(n_more, keys[-1])],
    )
    ids, counted, places = (torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for parts in arrays)
    asked = np.concatenate([start + row.kept for start, row in zip(tokens, laid, strict=False)])
    slices = []
    for start in range(0, tokens[-1], size):
        stop = min(start + size, tokens[-1])
        pieces = _pieces(start, stop, laid, tokens, keys, fills)
        inside = asked[(asked >= start) & (asked < stop)] - start
        slices.append(_slice(slice(start, stop + (n_more if stop == tokens[-1] else 0)), pieces, inside, device))
    return Pass(
        ids, counted, places, keys[-1], tuple(slices), tuple((prefix, sources[key]) for key, prefix in new.items())
    )


def _borders(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _pieces(
    start: int, stop: int, rows: Sequence[Row], tokens: Sequence[int], keys: Sequence[int], fills: Mapping[int, Fill]
) -> list[Piece]:
    """What of which rows lies in the tokens `start:stop`."""
    pieces = []
    for place in range(bisect_right(tokens, start) - 1, len(rows)):
        first, last = max(start, tokens[place]), min(stop, tokens[place + 1])
        if first >= last:
            break
        key_stop = keys[place] + len(rows[place].prefix) + last - tokens[place]
        fill = fills.get(place) if first == tokens[place] else None
        pieces.append(Piece(first - start, last - start, keys[place], key_stop, fill))
    return pieces


def _slice(tokens: slice, pieces: Sequence[Piece], kept: Array, device: torch.device) -> Slice:
    lengths = [piece.stop - piece.start for piece in pieces]
    key_lengths = [piece.key_stop - piece.key_start for piece in pieces]
    offsets, key_offsets = (
        torch.tensor(_borders(sizes), dtype=torch.int32, device=device) for sizes in (lengths, key_lengths)
    )
    asked: list[Piece] = []
    for piece in pieces:
        for place in kept[(kept >= piece.start) & (kept < piece.stop)].tolist():
            key_stop = piece.key_stop - (piece.stop - 1 - place)
            asked.append(Piece(len(asked), len(asked) + 1, piece.key_start, key_stop, None))
    return Slice(
        tokens,
        tuple(pieces),
        torch.from_numpy(kept).to(device),
        tuple(asked),
        offsets,
        key_offsets,
        max(lengths),
        max(key_lengths),
    )
