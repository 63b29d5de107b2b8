"""Packed attention against a plain loop over rows."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fundament.backbone import attention
from fundament.backbone.attention import Scoring, attend
from fundament.backbone.packed import BUNDLE_TOKENS, edge_of, group, hide, pack, places_of, rounded
from fundament.backbone.positions import Nearness, alibi, alibi_slopes, bucket, bucketed

CPU = torch.device("cpu")


def nearness_of(kind: str | None, n_heads: int) -> Nearness | None:
    match kind:
        case "alibi":
            return alibi(n_heads, CPU)
        case "bucketed":
            return bucketed(torch.randn(8, n_heads, generator=torch.Generator().manual_seed(1)), 20)
        case _:
            return None


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    *,
    causal: bool,
    window: int | None,
    nearness: Nearness | None,
    scale: float | None,
) -> Tensor:
    """Each row and each head on its own, by the definition."""
    scale = scale or 1 / math.sqrt(q.shape[2])
    out, start = torch.zeros(len(q), q.shape[1], q.shape[2]), 0
    for length in lengths:
        for head in range(q.shape[1]):
            kv = head * k.shape[1] // q.shape[1]
            rows = slice(start, start + length)
            scores = q[rows, head] @ k[rows, kv].T * scale
            for i in range(length):
                for j in range(length):
                    if nearness is not None:
                        scores[i, j] += nearness(torch.tensor([[j - i]]))[head, 0, 0]
                    if causal and (j > i or (window is not None and i - j >= window)):
                        scores[i, j] = -math.inf
            out[rows, head] = torch.softmax(scores, -1) @ v[rows, kv]
        start += length
    return out.flatten(1)


KERNELS = {"fused": (64, 0), "products": (1, 256), "products of few queries": (1, 16), "either": (30, 256)}
"""From how many tokens on rows go through two products, and how many queries these take per step."""


@contextmanager
def served_by(kernel: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "multiplies_faster", lambda device, dtype: kernel != "fused")
        patched.setattr(attention, "_PRODUCT_TOKENS", KERNELS[kernel][0])
        patched.setattr(attention, "_PRODUCT_QUERIES", KERNELS[kernel][1])
        yield


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 12), st.integers(1, 70)), min_size=1, max_size=6),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 5, 64]),
    kind=st.sampled_from([None, "alibi", "bucketed"]),
    scale=st.sampled_from([None, 1.0]),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 1)]),
    in_order=st.booleans(),
    kernel=st.sampled_from(list(KERNELS)),
)
def test_attention_equals_the_plain_loop(
    lengths: list[int],
    causal: bool,
    window: int | None,
    kind: str | None,
    scale: float | None,
    heads: tuple[int, int],
    in_order: bool,
    kernel: str,
) -> None:
    lengths = sorted(lengths) if in_order else lengths
    window = window if causal else None
    packed = pack([torch.zeros(length, dtype=torch.int64).numpy() for length in lengths], CPU)
    generator = torch.Generator().manual_seed(len(lengths))
    width = (heads[0] + 2 * heads[1]) * 8
    # q, k and v are slices of one matrix, as in the transformer; what follows the last row must not matter.
    qkv = torch.randn(len(packed.ids), width, generator=generator)
    q, k, v = (part.unflatten(-1, (-1, 8)) for part in qkv.split((heads[0] * 8, heads[1] * 8, heads[1] * 8), dim=-1))
    nearness = nearness_of(kind, heads[0])
    scoring = Scoring(causal=causal, window=window, nearness=nearness, scale=scale)
    with served_by(kernel):
        found = attend(q, k, v, packed, scoring)
    expected = plain(q, k, v, lengths, causal=causal, window=window, nearness=nearness, scale=scale)
    assert found.shape == expected.shape
    assert found.isfinite().all()  # of tokens of no row, too, which the next layer's products run over
    torch.testing.assert_close(found[: packed.n_tokens], expected[: packed.n_tokens], atol=1e-5, rtol=1e-4)
    for edge in (edge_of(packed, "first"), edge_of(packed, "last")):
        found = attend(q, k, v, packed, scoring, edge)
        assert found.shape == (len(edge.tokens), expected.shape[1])
        n = len(lengths)
        torch.testing.assert_close(found[:n], expected[edge.tokens[:n]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_the_gpu_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, causal: bool, window: int | None
) -> None:
    """What the variable-length kernel is given, read as its documentation says; the kernel itself needs a GPU."""

    def kernel(  # the signature is the kernel's: a name that it does not have fails here
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), 20)
        assert enable_gqa == (k.shape[1] != q.shape[1])
        if max_q == 1:  # one token of each row, which sees all of it
            assert window_size == (-1, -1)
            n = cu_seq_k.diff().tolist()
            whole = [part.transpose(0, 1).split(n, dim=1) for part in (k, v)]
            rows = zip(q[:, :, None], *whole, strict=True)
            return torch.stack([sdpa(*row, scale=scale, enable_gqa=True)[:, 0] for row in rows])
        assert window_size[1] == (0 if causal else -1)
        lengths = cu_seq_q.diff().tolist()
        sees = window_size[0] + 1 or None
        out = plain(q, k, v, lengths, causal=causal, window=sees, nearness=None, scale=scale)
        return out.unflatten(1, (q.shape[1], -1))

    offered = inspect.signature(varlen.varlen_attn).parameters
    assert {name: each.kind for name, each in inspect.signature(kernel).parameters.items() if name not in "qkv"} == {
        name: offered[name].kind for name in inspect.signature(kernel).parameters if name not in "qkv"
    }
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    window = window if causal else None
    packed = pack([torch.zeros(length, dtype=torch.int64).numpy() for length in (3, 20, 9)], CPU)
    q, k, v = (torch.randn(packed.n_tokens, heads, 4) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "has_varlen", lambda q: True)
    scoring = Scoring(causal=causal, window=window, scale=0.3)
    found = attend(q, k, v, packed, scoring)
    expected = plain(q, k, v, [3, 20, 9], causal=causal, window=window, nearness=None, scale=0.3)
    torch.testing.assert_close(found, expected)
    edge = edge_of(packed, "last")
    edge = replace(edge, tokens=edge.tokens[:3])  # on a GPU there are no tokens of no row
    torch.testing.assert_close(attend(q, k, v, packed, scoring, edge), expected[edge.tokens])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "alibi", "bucketed"])
def test_rows_longer_than_a_query_block(causal: bool, kind: str | None, kernel: str) -> None:
    lengths = [3, 1100]
    packed = pack([torch.zeros(length, dtype=torch.int64).numpy() for length in lengths], CPU)
    q, k, v = (torch.randn(len(packed.ids), 2, 4) for _ in range(3))
    nearness = nearness_of(kind, 2)
    with served_by(kernel):
        found = attend(q, k, v, packed, Scoring(causal=causal, nearness=nearness))
    row = slice(3, 1103)
    bias = torch.zeros(1100, 1100)
    distance = torch.arange(1100)[:, None] - torch.arange(1100)
    if causal:
        bias = bias.masked_fill(distance < 0, -math.inf)
    for head in range(2):
        scores = q[row, head] @ k[row, head].T / 2 + bias
        if nearness is not None:
            scores = scores + nearness(-distance)[head]
        expected = torch.softmax(scores, -1) @ v[row, head]
        torch.testing.assert_close(found[row].unflatten(1, (2, 4))[:, head], expected, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_runs_cover_every_row_in_order(lengths: list[int]) -> None:
    runs = group(lengths)
    found = [length for run in runs for length in (run.row_lengths or (run.length,) * run.n_blocks)]
    assert found == lengths
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    assert all(run.length <= BUNDLE_TOKENS for run in runs if run.row_lengths)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=40))
def test_no_row_lies_in_two_bundles(lengths: list[int]) -> None:
    places, n_bundles = places_of(lengths, 32)
    ends = [place + length for place, length in zip(places, lengths, strict=True)]
    assert places[0] == 0
    assert all(end <= place for end, place in zip(ends, places[1:], strict=False))
    assert [place // 32 for place in places] == [(end - 1) // 32 for end in ends]
    assert n_bundles == len({place // 32 for place in places})


def test_rows_are_bundled_where_one_call_takes_fewer_steps_or_several_lengths() -> None:
    assert [(run.n_blocks, run.row_lengths) for run in group([20, 20, 33, 16, 16, 20, 33, 7])] == [
        (2, ()),
        (1, ()),
        (2, (16, 16, 20)),
        (1, ()),
        (1, ()),
    ]
    assert [(run.n_blocks, run.row_lengths) for run in group([20, 31])] == [(2, (20, 31))]
    assert [(run.n_blocks, run.row_lengths) for run in group([16, 16])] == [(1, (16, 16))]


def test_layers_of_different_windows_and_rows_that_are_hidden_later_share_no_bundles() -> None:
    lengths = [20, 31, 16, 16, 7]
    packed = pack([np.zeros(n) for n in lengths], CPU)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(len(packed.ids), 2, 4, generator=generator) for _ in range(3))
    for window in (None, 4):
        found = attend(q, k, v, packed, Scoring(causal=True, window=window))
        expected = plain(q, k, v, lengths, causal=True, window=window, nearness=None, scale=None)
        torch.testing.assert_close(found[: packed.n_tokens], expected[: packed.n_tokens], atol=1e-5, rtol=1e-4)
    seen = attend(q, k, v, packed, Scoring())
    hidden = attend(q, k, v, hide(packed, [1] * len(lengths)), Scoring()).unflatten(1, (2, 4))
    torch.testing.assert_close(hidden[:20], v[:1].expand(20, -1, -1))
    assert not torch.allclose(seen.unflatten(1, (2, 4))[:20], hidden[:20])


def test_a_row_that_is_not_finite_spoils_its_own_bundle_at_most() -> None:
    packed = pack([np.zeros(n) for n in [5, *[20] * 12]], CPU)
    q, k, v = (torch.randn(len(packed.ids), 2, 4) for _ in range(3))
    v[0] = math.nan
    found = attend(q, k, v, packed, Scoring())[: packed.n_tokens]
    assert not found[:5].isfinite().any()
    assert found[25:].isfinite().all()


@given(st.integers(1, 100_000))
def test_token_numbers_are_rounded_up_to_few_shapes(n: int) -> None:
    more = rounded(n) - n
    assert 0 <= more < max(16, n / 8)
    assert rounded(rounded(n)) == rounded(n)


def test_there_are_few_shapes_and_large_batches_are_hardly_filled_up() -> None:
    assert len({rounded(n) for n in range(1, 4097)}) <= 130
    assert max((rounded(n) - n) / n for n in range(1_024, 100_000)) < 1 / 32


def test_slopes_are_those_of_the_paper() -> None:
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-n for n in range(1, 9)]))
    twelve = alibi_slopes(12)
    torch.testing.assert_close(twelve[:8], alibi_slopes(8))
    torch.testing.assert_close(twelve[8:], alibi_slopes(16)[0:8:2])


def test_alibi_falls_with_the_distance() -> None:
    torch.testing.assert_close(
        alibi(8, CPU)(torch.tensor([[-3, 0, 2]])), alibi_slopes(8)[:, None, None] * torch.tensor([[-3.0, 0.0, -2.0]])
    )


def test_buckets_are_those_of_t5() -> None:
    """32 buckets up to 128 tokens: single distances below 8, then spans that grow by the square root of two."""
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    offsets = torch.arange(-300, 301)
    expected = [sum(start <= abs(offset) for start in starts) - 1 + 16 * (offset > 0) for offset in offsets.tolist()]
    assert bucket(offsets, 32, 128).tolist() == expected


def test_far_offsets_share_a_bucket() -> None:
    table = torch.randn(32, 3)
    bias = bucketed(table, 128)(torch.tensor([[-5000, -128, -100, 0, 1, 100, 128, 5000]]))
    assert torch.equal(bias[:, 0], table[[15, 15, 15, 0, 17, 31, 31, 31]].T)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sloped", [False, True])
def test_hidden_tokens_attend_and_are_not_attended_to(sloped: bool, kernel: str) -> None:
    lengths, visible = [3, 5, 2, 30, 31, 60, 60, 60, 1100, 5, 31], [2, 5, 1, 30, 1, 60, 7, 59, 1090, 5, 2]
    packed = hide(pack([np.zeros(n) for n in lengths], CPU), visible)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(len(packed.ids), 2, 4, generator=generator) for _ in range(3))
    slopes = alibi_slopes(2) if sloped else None
    with served_by(kernel):
        found = attend(q, k, v, packed, Scoring(nearness=alibi(2, CPU) if sloped else None)).unflatten(1, (2, 4))
    start = 0
    for n, seen in zip(lengths, visible, strict=True):
        row, keys = slice(start, start + n), slice(start, start + seen)
        distance = (torch.arange(n)[:, None] - torch.arange(seen)).abs()
        for head in range(2):
            scores = q[row, head] @ k[keys, head].T / 2
            if slopes is not None:
                scores = scores - slopes[head] * distance
            expected = torch.softmax(scores, -1) @ v[keys, head]
            torch.testing.assert_close(found[row, head], expected, atol=1e-5, rtol=1e-4)
        start += n
