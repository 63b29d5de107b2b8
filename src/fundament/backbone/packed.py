"""Rows laid end to end: one `[tokens, …]` matrix for a whole batch, with no padding anywhere."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fundament.core import Array

BUNDLE_TOKENS = 32
"""Places of a bundle: the CPU's kernel takes queries in steps of so many, each at about the same cost.

Rows that fit in one are bundled for attention, several to a step where they can be, and neighbours go in one call
(`benchmarks/attention.py`).
"""

_FEW_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows that attention takes in one call, from token `start` on.

    Either `n_blocks` rows of `length` tokens each, or rows of `row_lengths` that lie in as many bundles of `length`
    places each.
    """

    start: int
    n_blocks: int
    length: int
    row_lengths: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + (sum(self.row_lengths) or self.n_blocks * self.length)


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens whose rows all ask for one adapter.

    Attributes:
        adapter: its place in the transformer.
        start: the first token.
        stop: one past the last.
        window: from where to where a product runs that is wanted of these tokens: a little further than they do on a
            CPU, so that it has one of few shapes.
    """

    adapter: int
    start: int
    stop: int
    window: tuple[int, int]

    def only(self, x: Tensor) -> Tensor:
        """Zero the tokens of other rows in `x`, which is `[tokens of the window, …]`."""
        begin, end = self.window
        x[: self.start - begin] = 0
        x[len(x) - (end - self.stop) :] = 0
        return x


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch of rows, end to end.

    Attributes:
        n_tokens: tokens of all rows.
        ids: token ids, int64 `[tokens]`; a few of no row may follow the last row's, whose results mean nothing.
        positions: each token's place in its own row, from 0, int64 `[tokens]`.
        lengths: tokens of each row, int64 `[rows]`.
        offsets: where each row starts, and the end, int32 `[rows + 1]`.
        bounds: the same as numbers of the host, so that nobody waits for the device to learn them.
        runs: neighbouring rows that attention takes together.
        longest: tokens of the longest row.
        kept: what attention needs of a run in every layer, made by the first.
        spans: where rows ask for an adapter; empty where all rows use the base weights.
        unseen: tokens that attend to others and that none attends to, bool `[tokens]`; None where there are
            none.
    """

    n_tokens: int
    ids: Tensor
    positions: Tensor
    lengths: Tensor
    offsets: Tensor
    bounds: tuple[int, ...]
    runs: tuple[Run, ...]
    longest: int
    spans: tuple[Span, ...] = ()
    unseen: Tensor | None = None
    kept: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Edge:
    """One token of each row, where its last state is the only one that is wanted.

    Attributes:
        which: of its row, the first or the last.
        tokens: which tokens they are, int64 `[rows]`; a few of no row may follow, whose results mean nothing.
        offsets: from 0 to the number of rows, int32 `[rows + 1]`.
        spans: where their rows ask for an adapter, in places of `tokens`.
    """

    which: Literal["first", "last"]
    tokens: Tensor
    offsets: Tensor
    spans: tuple[Span, ...]


def edge_of(packed: Packed, which: Literal["first", "last"]) -> Edge:
    """The first or the last token of each row."""
    places = [*packed.bounds[:-1]] if which == "first" else [stop - 1 for stop in packed.bounds[1:]]
    device, n = packed.ids.device, len(places)
    fit = rounded if device.type == "cpu" else int
    tokens = torch.tensor(places + [0] * (fit(n) - n), device=device)
    found = ((span.adapter, bisect_left(places, span.start), bisect_left(places, span.stop)) for span in packed.spans)
    spans = tuple(_span(*part, n_tokens=fit(n), fit=fit) for part in found if part[1] < part[2])
    return Edge(which, tokens, torch.arange(n + 1, dtype=torch.int32, device=device), spans)


def hide(packed: Packed, visible: Sequence[int]) -> Packed:
    """The batch with each row's tokens from the `visible`-th on hidden from attention; each row keeps one at least.

    Where none is hidden it is the batch as it was, for which attention has faster ways.
    """
    unseen = np.zeros(len(packed.ids), dtype=np.bool_)
    for (start, stop), n in zip(pairwise(packed.bounds), visible, strict=True):
        unseen[start + n : stop] = True
    if not unseen.any():
        return packed
    return replace(packed, unseen=torch.from_numpy(unseen).to(packed.ids.device), kept={})


BASE = -1
"""The adapter of a row that uses the base weights."""


def rounded(n_tokens: int) -> int:
    """A near number of tokens, not below: 24 of them up to 96, then up to 32 between one power of two and the next.

    oneDNN compiles a product for every shape it meets, which takes longer than the product itself; few shapes are all
    met soon (`benchmarks/attention.py`). A few short queries are little work, to which a lane of nothing would add.
    """
    least = 4 if n_tokens <= _FEW_TOKENS else 16 if n_tokens < 512 else 32
    step = max(least, 1 << max(0, n_tokens.bit_length() - 6))
    return -(-n_tokens // step) * step


def rounded_closely(n_tokens: int) -> int:
    """A nearer number than `rounded` gives, one of up to 64 between one power of two and the next.

    For models of billions of weights: what is filled up takes them longer than another shape takes to compile.
    """
    step = max(4, 1 << max(0, n_tokens.bit_length() - 7))
    return -(-n_tokens // step) * step


def pack(
    rows: Sequence[Array], device: torch.device, adapters: Sequence[int] = (), *, fit: Callable[[int], int] = rounded
) -> Packed:
    """Lay rows of token ids end to end, in the given order: sort them first, so that runs and spans are long.

    Args:
        rows: token ids of each row.
        device: where the batch goes.
        adapters: each row's adapter or `BASE`; left out, all rows use the base weights.
        fit: up to how many tokens so many are filled up on a CPU; `int` leaves them as they are.
    """
    lengths = [len(row) for row in rows]
    n_tokens = sum(lengths)
    fit = fit if device.type == "cpu" else int
    more = np.zeros(fit(n_tokens) - n_tokens, dtype=np.int64)
    ids = torch.from_numpy(np.concatenate([*rows, more]).astype(np.int64, copy=False))
    positions = torch.from_numpy(np.concatenate([*(np.arange(length) for length in lengths), more]))
    bounds = tuple(accumulate(lengths, initial=0))
    return Packed(
        n_tokens,
        ids.to(device),
        positions.to(device),
        torch.tensor(lengths, device=device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        bounds,
        group(lengths),
        max(lengths),
        spread(adapters, lengths, fit) if adapters else (),
    )


def rows_of(lengths: Sequence[int], device: torch.device, *, fit: Callable[[int], int] = rounded) -> Packed:
    """A batch of rows that have states and no token ids; the rest as `pack` takes it."""
    return pack([np.zeros(length, dtype=np.int64) for length in lengths], device, fit=fit)


def padded(x: Tensor, packed: Packed) -> Tensor:
    """What tokens have, `[tokens, …]`, and zeros for those of no row."""
    more = len(packed.ids) - len(x)
    return torch.cat((x, x.new_zeros(more, *x.shape[1:]))) if more else x


def spread(adapters: Sequence[int], lengths: Sequence[int], fit: Callable[[int], int]) -> tuple[Span, ...]:
    """The spans of rows, in their order; `fit` says how many tokens a product runs over that wants so many."""
    n_tokens, start, spans = fit(sum(lengths)), 0, []
    for adapter, sharing in groupby(zip(adapters, lengths, strict=True), key=itemgetter(0)):
        stop = start + sum(length for _, length in sharing)
        if adapter != BASE:
            spans.append(_span(adapter, start, stop, n_tokens=n_tokens, fit=fit))
        start = stop
    return tuple(spans)


def _span(adapter: int, start: int, stop: int, *, n_tokens: int, fit: Callable[[int], int]) -> Span:
    end = min(n_tokens, start + fit(stop - start))
    return Span(adapter, start, stop, (end - fit(stop - start), end))


def group(lengths: Sequence[int], bundle: int = BUNDLE_TOKENS) -> tuple[Run, ...]:
    """Divide rows, in their order, into the runs that attention takes: short ones together, long ones of equal length.

    Args:
        lengths: tokens of each row.
        bundle: places of a bundle.
    """
    runs: list[Run] = []
    start = 0
    for width, sharing in groupby(lengths, key=lambda length: max(length, bundle)):
        rows = tuple(sharing)
        fits_twice = 2 * min(rows) <= bundle
        bundled = width == bundle and len(rows) > 1 and (fits_twice or min(rows) < max(rows))
        run = Run(start, places_of(rows, bundle)[1], bundle, rows) if bundled else Run(start, len(rows), rows[0])
        runs.append(run)
        start = run.stop
    return tuple(runs)


def places_of(lengths: Sequence[int], bundle: int) -> tuple[list[int], int]:
    """Where each row begins when rows lie in bundles in their order, none in two of them, and how many bundles."""
    places: list[int] = []
    place = 0
    for length in lengths:
        if place % bundle + length > bundle:
            place += -place % bundle
        places.append(place)
        place += length
    return places, -(-place // bundle)
