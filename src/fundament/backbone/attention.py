"""Attention over packed rows: each row sees itself alone."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.packed import Packed, Run
from fundament.backbone.positions import Nearness

_QUERY_BLOCK = 1024  # query tokens per step where scores carry a bias, so that the bias stays small at long context
_LANES = 16  # the CPU kernel is up to 1.8 times as slow where the keys are no multiple (`benchmarks/attention.py`)
_CAUSAL_BIAS_TOKENS = 256  # above, skipping what a causal row does not see saves more (`benchmarks/attention.py`)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    *,
    causal: bool = False,
    window: int | None = None,
    nearness: Nearness | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention within each row.

    Args:
        q: `[tokens, heads, head_dim]`.
        k: `[tokens, kv_heads, head_dim]`; each serves `heads // kv_heads` query heads.
        v: as `k`.
        packed: where rows begin and end.
        causal: a token sees itself and what came before.
        window: with `causal`, how many tokens it sees, itself included.
        nearness: what is added to a score for how far its key is from its query.
        scale: what scores are multiplied by; None means `1 / sqrt(head_dim)`.

    Returns:
        `[tokens, heads * head_dim]`.
    """
    if q.is_cuda and q.dtype != torch.float32 and nearness is None and packed.unseen is None:
        return _attend_varlen(q, k, v, packed, causal=causal, window=window, scale=scale)
    parts = [_attend_run(q, k, v, packed, run, causal, window, nearness, scale) for run in packed.runs]
    if len(q) > packed.n_tokens:
        parts.append(q.new_zeros(len(q) - packed.n_tokens, parts[0].shape[1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, *, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = window - 1 if window else -1
    out = varlen_attn(
        q,
        k,
        v,
        packed.offsets,
        packed.offsets,
        packed.longest,
        packed.longest,
        scale=scale,
        window_size=(left, 0) if causal else (-1, -1),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _attend_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed,
    run: Run,
    causal: bool,
    window: int | None,
    nearness: Nearness | None,
    scale: float | None,
) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    queries = _blocks(q, run, run.start, run.length)
    plain = nearness is None and packed.unseen is None and not run.row_lengths
    sees_all = plain and (window is None or window >= run.length)
    if sees_all and causal and run.length > _CAUSAL_BIAS_TOKENS:
        keys, values = _blocks(k, run, run.start, run.length), _blocks(v, run, run.start, run.length)
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        begin, width = _reach(run, len(k))
        keys, values = _blocks(k, run, begin, width), _blocks(v, run, begin, width)
        out_blocks = []
        for first in range(0, run.length, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, run.length)
            bias = _bias(packed, Scores(run, first, last, begin, width), causal, window, nearness, q)
            block = queries[:, :, first:last]
            out_blocks.append(
                F.scaled_dot_product_attention(block, keys, values, attn_mask=bias, scale=scale, enable_gqa=grouped)
            )
        out = out_blocks[0] if len(out_blocks) == 1 else torch.cat(out_blocks, dim=2)
    return out.transpose(1, 2).reshape(run.n_blocks * run.length, -1)


def _blocks(x: Tensor, run: Run, begin: int, width: int) -> Tensor:
    """Each block's `width` tokens, the first block's from token `begin` on: `[blocks, heads, width, head_dim]`.

    A view: blocks overlap where they are wider than the run's rows are long.
    """
    token, head, number = x.stride()
    size = (run.n_blocks, x.shape[1], width, x.shape[2])
    return x.as_strided(size, (run.length * token, head, token, number), x.storage_offset() + begin * token)


def _reach(run: Run, n_tokens: int) -> tuple[int, int]:
    """Where a block's keys begin and how many there are.

    They reach into the neighbouring rows, which the bias hides, so that their number is a multiple of `_LANES`.
    """
    width = -(-run.length // _LANES) * _LANES
    begin = min(run.start, n_tokens - width - (run.n_blocks - 1) * run.length)
    return (begin, width) if begin >= 0 else (run.start, run.length)


@dataclass(frozen=True, slots=True)
class Scores:
    """A rectangle of attention scores of a run's blocks: query tokens `first:last`, `width` keys from `begin` on."""

    run: Run
    first: int
    last: int
    begin: int
    width: int


def _bias(
    packed: Packed, scores: Scores, causal: bool, window: int | None, nearness: Nearness | None, like: Tensor
) -> Tensor | None:
    """`score_bias`, computed once per batch for short runs and anew for long ones, where it would take much memory."""
    run = scores.run
    plain = nearness is None and packed.unseen is None and not run.row_lengths
    if plain and not causal and scores.width == run.length:
        return None
    key = (run.start, window)
    if key in packed.biases:
        return packed.biases[key]
    bias = score_bias(scores, causal=causal, window=window, nearness=nearness, like=like)
    if packed.unseen is not None:
        # Each block has keys of its own that are hidden: `[blocks, 1, 1, keys]`.
        unseen = packed.unseen.as_strided((run.n_blocks, scores.width), (run.length, 1), scores.begin)
        bias = torch.where(unseen[:, None, None, :], float("-inf"), bias)
    if run.length <= _QUERY_BLOCK:
        packed.biases[key] = bias
    return bias


def score_bias(scores: Scores, *, causal: bool, window: int | None, nearness: Nearness | None, like: Tensor) -> Tensor:
    """What is added to scores: `[1, 1 or heads, 1 or queries, keys]`.

    A key out of sight, or of another row, gets minus infinity. The leading 1 matters: with three dimensions PyTorch
    leaves its fused kernel and writes all scores out.
    """
    run = scores.run
    keys = torch.arange(scores.width, device=like.device) + (scores.begin - run.start)
    queries = torch.arange(scores.first, scores.last, device=like.device)[:, None]
    hidden = ((keys < 0) | (keys >= run.length))[None]
    if run.row_lengths:
        lengths = torch.tensor(run.row_lengths, device=like.device)
        row = torch.repeat_interleave(torch.arange(len(lengths), device=like.device), lengths)
        hidden = hidden | (row[queries] != row[keys.clamp(0, run.length - 1)])
    if causal:
        hidden = hidden | (keys > queries)
    if causal and window is not None:
        hidden = hidden | (queries - keys >= window)
    bias = torch.zeros(1, 1, 1, device=like.device) if nearness is None else nearness(keys - queries)
    return torch.where(hidden, float("-inf"), bias).to(like.dtype)[None]
