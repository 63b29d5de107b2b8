"""How rows are laid end to end."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fundament.backbone.packed import BASE, Span, edge_of, pack, rounded, rounded_closely

CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(BASE, 2), st.integers(1, 4)), min_size=1, max_size=12))
def test_every_token_is_in_the_span_of_its_rows_adapter(rows: list[tuple[int, int]]) -> None:
    packed = pack([np.arange(length) for _, length in rows], CPU, [adapter for adapter, _ in rows])
    found = np.full(packed.n_tokens, BASE)
    for span in packed.spans:
        assert (found[span.start : span.stop] == BASE).all()
        found[span.start : span.stop] = span.adapter
    assert found.tolist() == [adapter for adapter, length in rows for _ in range(length)]
    for span in packed.spans:
        begin, end = span.window
        assert 0 <= begin <= span.start < span.stop <= end <= len(packed.ids)
        assert end - begin == rounded(span.stop - span.start)
    assert all(a.adapter != b.adapter or a.stop < b.start for a, b in zip(packed.spans, packed.spans[1:], strict=False))


@given(st.lists(st.tuples(st.integers(BASE, 2), st.integers(1, 4)), min_size=1, max_size=40))
def test_every_row_has_one_token_on_an_edge_with_its_adapter(rows: list[tuple[int, int]]) -> None:
    packed = pack([np.arange(length) for _, length in rows], CPU, [adapter for adapter, _ in rows])
    for edge, places in (
        (edge_of(packed, "first"), packed.offsets[:-1]),
        (edge_of(packed, "last"), packed.offsets[1:] - 1),
    ):
        assert edge.tokens[: len(rows)].tolist() == places.tolist()
        assert len(edge.tokens) == rounded(len(rows))
        assert edge.offsets.tolist() == [*range(len(rows) + 1)]
        found = np.full(len(rows), BASE)
        for span in edge.spans:
            found[span.start : span.stop] = span.adapter
            begin, end = span.window
            assert 0 <= begin <= span.start < span.stop <= end <= len(edge.tokens)
        assert found.tolist() == [adapter for adapter, _ in rows]


@given(st.integers(1, 100_000))
def test_a_batch_is_filled_up_by_little(n: int) -> None:
    assert n <= rounded_closely(n) <= rounded(n) < n + max(32, n / 16)
    assert rounded_closely(n) < n + max(4, n / 32)
    assert len(pack([np.zeros(min(n, 999))], CPU, fit=rounded_closely).ids) == rounded_closely(min(n, 999))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_runs_and_offsets_cover_all_tokens(lengths: list[int]) -> None:
    packed = pack([np.arange(length) + 10 for length in lengths], CPU)
    assert packed.lengths.tolist() == lengths
    assert packed.offsets.tolist() == [0, *np.cumsum(lengths)]
    assert [n for run in packed.runs for n in (run.row_lengths or [run.length] * run.n_blocks)] == lengths
    assert [run.start for run in packed.runs] + [packed.runs[-1].stop] == [0, *(run.stop for run in packed.runs)]
    n = packed.n_tokens
    assert torch.equal(packed.positions[:n], packed.ids[:n] - 10)
    assert packed.longest == max(lengths)


def test_base_rows_have_no_spans() -> None:
    rows = [np.arange(2), np.arange(3)]
    assert pack(rows, CPU).spans == pack(rows, CPU, [BASE, BASE]).spans == ()
    assert pack(rows, CPU, [BASE, 4]).spans == (Span(4, 2, 5, (2, 6)),)


def test_each_row_has_an_adapter() -> None:
    with pytest.raises(ValueError, match="zip"):
        pack([np.arange(2), np.arange(3)], CPU, [0])
