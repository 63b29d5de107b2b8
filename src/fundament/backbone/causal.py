"""Causal attention of queries that end where their keys end: a row's later tokens, or all of them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.attention import KEY_LANES, Scoring, attend_varlen, has_varlen
from fundament.backbone.packed import rounded
from fundament.backbone.passes import Piece, Slice
from fundament.backbone.products import attend_in_products, multiplies_faster

_LEAST_QUERIES = 16  # fewer go through the fused kernel, which compiles nothing for each number of keys
_QUERY_BLOCK = 128  # queries per step: few, so that little is computed of what they do not see yet


def attend_slice(q: Tensor, keys: Tensor, values: Tensor, part: Slice, scoring: Scoring) -> Tensor:
    """Scaled dot-product attention of a slice's tokens, each to its own row up to itself.

    Args:
        q: `[tokens of the slice, heads, head_dim]`.
        keys: `[keys of the pass, kv_heads, head_dim]`, filled as far as the slice's rows have come.
        values: as `keys`.
        part: which keys are whose.
        scoring: causal, without nearness.

    Returns:
        `[tokens of the slice, heads * head_dim]`; zero for tokens of no row.
    """
    assert scoring.causal and scoring.nearness is None
    if has_varlen(q):
        return _attend_varlen(q, keys, values, part, scoring)
    return _attend_pieces(q, keys, values, part.pieces, scoring)


def attend_asked(q: Tensor, keys: Tensor, values: Tensor, part: Slice, scoring: Scoring) -> Tensor:
    """The same of those tokens alone whose states are asked for, `[asked, heads * head_dim]`."""
    assert scoring.causal and scoring.nearness is None
    if has_varlen(q):
        return _attend_varlen(q, keys, values, part, scoring)[part.kept]
    return _attend_pieces(q[part.kept], keys, values, part.asked, scoring)


def _attend_pieces(q: Tensor, keys: Tensor, values: Tensor, pieces: Sequence[Piece], scoring: Scoring) -> Tensor:
    out = torch.zeros_like(q)
    for piece in pieces:
        tokens, row = slice(piece.start, piece.stop), slice(piece.key_start, piece.key_stop)
        attend_last(q[tokens], keys[row], values[row], out[tokens], scoring)
    return out.flatten(1)


def _attend_varlen(q: Tensor, keys: Tensor, values: Tensor, part: Slice, scoring: Scoring) -> Tensor:
    n, lie = part.pieces[-1].stop, slice(part.pieces[0].key_start, part.pieces[-1].key_stop)
    rows, key_rows = (part.offsets, part.longest), (part.key_offsets, part.key_longest)
    return attend_varlen(q[:n], keys[lie], values[lie], rows, key_rows, scoring)


def attend_last(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, scoring: Scoring) -> None:
    """Scaled dot-product attention of one row's last tokens to all of the row.

    Args:
        q: `[queries, heads, head_dim]`, of the last so many tokens.
        keys: `[tokens, kv_heads, head_dim]`; each serves `heads // kv_heads` query heads.
        values: as `keys`.
        out: the result, as `q`.
        scoring: causal, without nearness.
    """
    assert scoring.causal and scoring.nearness is None
    before, window = len(keys) - len(q), scoring.window
    scale = 1 / math.sqrt(q.shape[-1]) if scoring.scale is None else scoring.scale
    products = not q.is_cuda and (q.dtype == torch.float32 or multiplies_faster(q.device, q.dtype))
    attend = _attend_in_products if products and len(q) >= _LEAST_QUERIES else _attend_fused
    for first in range(0, len(q), _QUERY_BLOCK):
        block = slice(first, min(first + _QUERY_BLOCK, len(q)))
        start = 0 if window is None else max(0, before + first - window + 1)
        # A little further than is seen: a long row would have a product of a new shape for each of its blocks.
        n_seen = -(-rounded(before + block.stop - start) // KEY_LANES) * KEY_LANES
        seen = slice(start, min(len(keys), start + n_seen))
        attend(q[block], keys[seen], values[seen], out[block], before + first - start, window, scale)


def _attend_in_products(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, n_before: int, window: int | None, scale: float
) -> None:
    n_kv = keys.shape[1]
    # Of the keys before the queries' own, only a window hides any.
    first = n_before if window is None or window >= len(keys) else 0
    bias = hidden_bias(len(q), len(keys) - first, n_before - first, window, q.device).to(q.dtype)[None, None]
    queries, result = (part.unflatten(1, (n_kv, -1)).permute(1, 2, 0, 3) for part in (q, out))
    attend_in_products(queries, keys.transpose(0, 1), values.transpose(0, 1), result, bias, scale)


def _attend_fused(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, n_before: int, window: int | None, scale: float
) -> None:
    n_group = q.shape[1] // keys.shape[1]
    bias = hidden_bias(len(q), len(keys), n_before, window, q.device).to(q.dtype)[None, None]
    # The heads of a group are a batch over the same keys: `[group, kv_heads, tokens, head_dim]`.
    queries, result = (part.unflatten(1, (-1, n_group)).permute(2, 1, 0, 3) for part in (q, out))
    by_head, of_head = (part.transpose(0, 1).expand(n_group, -1, -1, -1) for part in (keys, values))
    result.copy_(F.scaled_dot_product_attention(queries, by_head, of_head, attn_mask=bias, scale=scale))


def hidden_bias(n: int, n_keys: int, n_before: int, window: int | None, device: torch.device) -> Tensor:
    """What is added to the scores of `n` tokens that have `n_before` keys before the first one's own, `[n, n_keys]`.

    Minus infinity for what is out of sight.
    """
    distance = torch.arange(n, device=device)[:, None] + n_before - torch.arange(n_keys, device=device)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(n, n_keys, device=device).masked_fill_(hidden, -math.inf)
