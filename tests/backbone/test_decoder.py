"""Rows that share beginnings, and long rows in slices, against the packed transformer that knows neither."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fundament.backbone import causal, passes
from fundament.backbone.attention import Scoring
from fundament.backbone.causal import attend_last
from fundament.backbone.decoder import Decoder
from fundament.backbone.packed import pack
from fundament.backbone.passes import Row, costs, share, share_alike
from fundament.backbone.transformer import Shape, Transformer, parameters
from fundament.core import Array
from fundament.errors import CheckpointError

SHAPE = Shape(
    vocab=50,
    hidden=32,
    intermediate=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    norm="rms",
    norm_eps=1e-6,
    pre_norm=True,
    positions="rotary",
    causal=True,
    qkv_bias=False,
    out_bias=False,
    qk_norm="head",
    gated=True,
    activation="silu",
    up_bias=False,
    down_bias=False,
    window=(4, None, 6),
)
TOKEN_BYTES = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, size, float32
CPU = torch.device("cpu")


def made(shape: Shape = SHAPE) -> Transformer:
    draw = torch.Generator().manual_seed(0)
    return Transformer(
        shape, {name: 0.4 * torch.randn(size, generator=draw) for name, size in parameters(shape).items()}
    )


TRANSFORMER = made()


def ids(n: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 50, n)


def expected(row: Row, transformer: Transformer = TRANSFORMER) -> Tensor:
    whole = np.concatenate([row.prefix, row.ids])
    return transformer(pack([whole], CPU))[len(row.prefix) + row.kept]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CPU_SLICE_TOKENS", 16)


rows = st.builds(
    lambda n_prefix, n_own, seed: Row(ids(n_prefix), ids(n_own, seed), np.unique(ids(3, seed) % n_own)),
    st.sampled_from([0, 3, 9, 20]),
    st.integers(1, 40),
    st.integers(0, 100),
)


@settings(deadline=None, max_examples=25)
@given(
    batches=st.lists(st.lists(rows, min_size=1, max_size=8), min_size=1, max_size=3),
    most_shared=st.sampled_from([0, 10, 25, 1000]),
)
def test_rows_in_any_company_equal_the_row_alone(batches: list[list[Row]], most_shared: int) -> None:
    """Whatever is kept, from earlier batches too, and whatever had to go."""
    decoder = Decoder(TRANSFORMER, prefix_bytes=most_shared * TOKEN_BYTES)
    assert decoder.most_shared == most_shared
    for batch in batches:
        for row, found in zip(batch, decoder.states(batch), strict=True):
            close(found, expected(row))
        assert decoder.prefixes.n_bytes <= most_shared * TOKEN_BYTES


def test_a_kept_prefix_is_used_and_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(TRANSFORMER)
    row = Row(ids(9), ids(5, 1), np.array([4]))
    first = decoder.states([row])[0]
    kept = decoder.prefixes.get(row.prefix.tobytes())
    assert kept is not None
    assert kept.shape == (3, 2, 9, 2, 8)
    assert decoder.prefixes.n_bytes == kept.nbytes == 9 * TOKEN_BYTES
    laid: list[int] = []
    lay = passes.lay
    monkeypatch.setattr(
        "fundament.backbone.decoder.lay", lambda *args: (out := lay(*args), laid.append(out.slices[-1].tokens.stop))[0]
    )
    close(decoder.states([row])[0], first)
    assert laid == [8]  # five tokens of its own and what makes a round number
    with torch.inference_mode():
        kept.zero_()
    assert (decoder.states([row])[0] - first).abs().max() > 1e-2


def test_threads_share_what_is_kept() -> None:
    decoder = Decoder(TRANSFORMER, prefix_bytes=25 * TOKEN_BYTES)
    found: list[tuple[Row, Tensor]] = []

    def work(seed: int) -> None:
        for again in range(8):
            batch = [Row(ids(n, n), ids(7, seed), np.array([again % 7])) for n in (9, 12, 20)]
            found.extend(zip(batch, decoder.states(batch), strict=True))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * 8 * 3
    for row, state in found:
        close(state, expected(row))


@pytest.mark.parametrize("window", [None, 1, 100, 300])
@pytest.mark.parametrize("n_queries", [1, 5, 300, 420])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_the_last_queries_see_what_came_before(
    window: int | None, n_queries: int, heads: tuple[int, int], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr("fundament.backbone.causal._attend_in_products", causal._attend_fused)
    draw = torch.Generator().manual_seed(1)
    q, keys, values = (torch.randn(420, n, 8, generator=draw) for n in (heads[0], heads[1], heads[1]))
    out = torch.empty(n_queries, heads[0], 8)
    attend_last(q[-n_queries:], keys, values, out, Scoring(causal=True, window=window, scale=0.5))
    distance = torch.arange(420)[:, None] - torch.arange(420)
    hidden = (distance < 0) | (distance >= (window or 420))
    for head in range(heads[0]):
        of = head * heads[1] // heads[0]
        scores = (q[:, head] @ keys[:, of].T * 0.5).masked_fill(hidden, float("-inf"))
        close(out[:, head], (torch.softmax(scores, -1) @ values[:, of])[-n_queries:])


class Largest(TorchDispatchMode):
    """The most numbers that any operator has given."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.n = max(self.n, tensor.untyped_storage().nbytes() // 4)
        return out


def test_memory_grows_with_the_tokens_and_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the size of all tokens times the MLP, the vocabulary or all tokens."""
    monkeypatch.setattr(passes, "CPU_SLICE_TOKENS", 256)
    monkeypatch.setattr("fundament.backbone.products._SCORE_BYTES", 2**19)
    shape = replace(SHAPE, intermediate=2000, vocab=2000, n_layers=2, window=())
    transformer = made(shape)
    row = Row(ids(0), ids(4000), np.array([10, 3999]))
    with Largest() as largest:
        found = Decoder(transformer).states([row])[0]
    # The scores of a block of queries, of two heads that share their keys, in memory of a power of two.
    assert largest.n <= 2 * 128 * 4096
    close(found, expected(row, transformer))


def test_what_rows_share_ends_before_what_is_asked_for() -> None:
    rows = [np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 4, 6]), np.array([1, 2, 3, 4])]
    shared = share(rows, [np.array([4]), np.array([3, 4]), np.array([3])], most=10)
    assert [row.prefix.tolist() for row in shared] == [[1, 2, 3]] * 3
    assert [row.kept.tolist() for row in shared] == [[1], [0, 1], [0]]
    assert [len(row.prefix) for row in share(rows, [np.array([3])] * 3, most=2)] == [2, 2, 2]
    assert [len(row.prefix) for row in share([rows[0], np.array([2, 1])], [np.array([1])] * 2, most=9)] == [0, 0]
    assert len(share(rows[:1], [np.array([4])], most=10)[0].prefix) == 0


def test_rows_share_with_their_kind_and_the_others_with_one_another() -> None:
    rows = [np.array(ids) for ids in ([1, 2, 3, 4, 8], [1, 5, 6, 8], [1, 2, 3, 5, 8], [1, 6, 6, 8], [1, 2, 3, 4, 9])]
    shared = share_alike(rows, [np.array([len(row) - 1]) for row in rows], most=10, kinds=[7, 3, 7, 5, 7])
    assert [row.prefix.tolist() for row in shared] == [[1, 2, 3], [1], [1, 2, 3], [1], [1, 2, 3]]
    assert [np.concatenate([row.prefix, row.ids]).tolist() for row in shared] == [row.tolist() for row in rows]
    assert costs(shared) == [5, 4, 2, 3, 2]


def test_a_transformer_of_another_make_is_refused() -> None:
    with pytest.raises(CheckpointError, match="share beginnings"):
        Decoder(made(replace(SHAPE, causal=False, window=())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    shape = replace(SHAPE, hidden=64, head_dim=32, window=(None, 5, None))
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.4 * torch.randn(size, generator=draw) for name, size in parameters(shape).items()}
    exact = Transformer(shape, weights)
    on_gpu = Decoder(Transformer(shape, {name: part.cuda().bfloat16() for name, part in weights.items()}))
    batch = [Row(ids(n, n), ids(7 + 5 * n, n), np.array([0, 6])) for n in (0, 3, 9, 9, 20)]
    for _ in range(2):
        for row, found in zip(batch, on_gpu.states(batch), strict=True):
            assert torch.cosine_similarity(found.float().cpu(), expected(row, exact)).min() > 0.99
