"""Attention in two products against the definition, and in bfloat16 against numbers before they are rounded."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone import products
from fundament.backbone.products import attend_in_products, multiplies_faster


def made(n_batch: int, n_group: int, n: int, n_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n)
    q = torch.randn(n_batch, n_group, n, 16, generator=draw)
    keys, values = (torch.randn(n_batch, n_keys, 16, generator=draw) for _ in range(2))
    return q, keys, values


@pytest.mark.parametrize("score_bytes", [1, 40_000, 2**21])  # a key head at a time, several, all at once
@pytest.mark.parametrize("bias", [None, (1, 1, 1, 5), (1, 1, 9, 64), (6, 2, 9, 64), (6, 1, 1, 3)])
@pytest.mark.parametrize("n", [9, 32])  # queries that are filled up, and whole lanes
@pytest.mark.parametrize("by_head", [False, True])
def test_products_are_attention(
    bias: tuple[int, ...] | None, score_bytes: int, n: int, by_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_SCORE_BYTES", score_bytes)
    q, keys, values = made(6, 2, n, 64)
    size = None if bias is None else tuple(n if part == 9 else part for part in bias)
    added = None if size is None else torch.randn(size).masked_fill(torch.rand(size) < 0.3, -math.inf)
    out = torch.empty_like(q) if by_head else torch.empty(n, 12, 16).unflatten(1, (6, 2)).permute(1, 2, 0, 3)
    attend_in_products(q, keys, values, out, added, 0.3)
    scores = torch.einsum("bgnd,bkd->bgnk", q, keys) * 0.3
    if added is not None:
        scores[..., 64 - added.shape[-1] :] += added
    expected = torch.einsum("bgnk,bkd->bgnd", torch.softmax(scores, -1), values)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "most"), [(1.0, 1.5), (4.0, 2.0)])  # scores about one, and about sixteen
def test_rounded_scores_cost_what_rounded_queries_and_keys_do(size: float, most: float) -> None:
    q, keys, values = made(4, 1, 300, 320)
    q, keys = q * size, keys * size
    exact = F.scaled_dot_product_attention(q.double(), keys[:, None].double(), values[:, None].double())
    q, keys, values = q.bfloat16(), keys.bfloat16(), values.bfloat16()
    fused = F.scaled_dot_product_attention(q, keys[:, None], values[:, None])
    out = torch.empty_like(q)
    attend_in_products(q, keys, values, out, None, 0.25)
    errors = [float((found.double() - exact).norm() / exact.norm()) for found in (fused, out)]
    assert errors[1] < most * errors[0]


@pytest.mark.parametrize(
    ("known", "dtype", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, True),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, False),  # the fused kernel uses the tiles
        ({"avx512_bf16": True, "amx_bf16": False}, torch.float32, False),
        ({}, torch.bfloat16, False),
    ],
)
def test_which_processors_multiply_faster(
    known: dict[str, bool], dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert multiplies_faster.__wrapped__(torch.device("cpu"), dtype) is expected
