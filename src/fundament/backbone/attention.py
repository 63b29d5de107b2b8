"""Attention over packed rows: each row sees itself alone."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.packed import Edge, Packed, Run, places_of
from fundament.backbone.positions import Nearness
from fundament.backbone.products import LANES, attend_in_products, multiplies_faster

_QUERY_BLOCK = 1024  # query tokens per step where scores carry a bias, so that the bias stays small at long context
_PRODUCT_QUERIES = 256  # the same of two products: few, so that causal rows compute little of what they do not see
_PRODUCT_TOKENS = 64  # shorter runs are faster in the fused kernel, which is one call (`benchmarks/attention.py`)
KEY_LANES = 16  # the CPU kernel is up to 1.8 times as slow where the keys are no multiple (`benchmarks/attention.py`)
_MOST_HEAD_DIM = 256  # of FlashAttention
_LEAST_CAPABILITY = (8, 0)
_CAUSAL_BIAS_TOKENS = 256  # above, skipping what a causal row does not see saves more (`benchmarks/attention.py`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Which keys a token sees, and how their scores are made.

    Attributes:
        causal: it sees itself and what came before.
        window: with `causal`, how many tokens it sees, itself included; None means all.
        nearness: what is added to a score for how far its key is from its query.
        scale: what scores are multiplied by; None means `1 / sqrt(head_dim)`.
    """

    causal: bool = False
    window: int | None = None
    nearness: Nearness | None = None
    scale: float | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, packed: Packed, scoring: Scoring, edge: Edge | None = None) -> Tensor:
    """Scaled dot-product attention within each row.

    Args:
        q: `[tokens, heads, head_dim]`.
        k: `[tokens, kv_heads, head_dim]`; each serves `heads // kv_heads` query heads.
        v: as `k`.
        packed: where rows begin and end.
        scoring: which keys of its row a token sees, and how.
        edge: the tokens that ask; None means all.

    Returns:
        What each token that asks has mixed, `[tokens, heads * head_dim]`.
    """
    if edge is not None:
        return _attend_edge(q, k, v, packed, edge, scoring)
    if has_varlen(q) and scoring.nearness is None and packed.unseen is None:
        rows = (packed.offsets, packed.longest)
        return attend_varlen(q, k, v, rows, rows, scoring)
    least = _PRODUCT_TOKENS if multiplies_faster(q.device, q.dtype) else math.inf
    in_products = [run.length >= least and not run.row_lengths for run in packed.runs]
    if not any(in_products):
        parts = [_attend_run(q, k, v, packed, run, scoring) for run in packed.runs]
        if further := len(q) - sum(map(len, parts)):
            parts.append(q.new_zeros(further, parts[0].shape[1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    mixed = q.new_empty(q.shape)
    for run, multiplies in zip(packed.runs, in_products, strict=True):
        if multiplies:
            _attend_run_in_products(q, k, v, packed, run, scoring, mixed)
        else:
            found = _attend_run(q, k, v, packed, run, scoring)
            mixed[run.start : run.start + len(found)] = found.view(-1, *q.shape[1:])
    mixed[packed.n_tokens :] = 0
    return mixed.flatten(1)


def has_varlen(q: Tensor) -> bool:
    """Whether the kernel for rows of any lengths takes such queries, `[tokens, heads, head_dim]`.

    FlashAttention 2 is written for GPUs from Ampere on (compute capability 8.0), formats of two bytes, and heads of a
    multiple of 8 numbers, 256 at most. What it does not take runs row by row.
    """
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _MOST_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= _LEAST_CAPABILITY
    )


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, rows: tuple[Tensor, int], key_rows: tuple[Tensor, int], scoring: Scoring
) -> Tensor:
    """Attention of rows of any lengths in one kernel, `[queries, heads * head_dim]`; `scoring` is without nearness.

    Args:
        q: `[queries, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]`.
        v: as `k`.
        rows: where each row's queries begin and end, int32 `[rows + 1]`, and most of a row.
        key_rows: the same of its keys. Fewer queries than keys are a row's last ones.
        scoring: which keys of its row a token sees, and how.
    """
    from torch.nn.attention.varlen import varlen_attn

    before = scoring.window - 1 if scoring.window else -1
    out = varlen_attn(
        q,
        k,
        v,
        rows[0],
        key_rows[0],
        rows[1],
        key_rows[1],
        scale=scoring.scale,
        window_size=(before, 0) if scoring.causal else (-1, -1),
        enable_gqa=k.shape[1] != q.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.flatten(1)


def _attend_edge(q: Tensor, k: Tensor, v: Tensor, packed: Packed, edge: Edge, scoring: Scoring) -> Tensor:
    plain = scoring.window is None and scoring.nearness is None and packed.unseen is None
    sees_all = plain and (edge.which == "last" or not scoring.causal)
    asking = q[edge.tokens]
    if sees_all and has_varlen(q):
        whole = Scoring(scale=scoring.scale)
        return attend_varlen(asking, k, v, (edge.offsets, 1), (packed.offsets, packed.longest), whole)
    parts, row = [], 0
    for run in packed.runs:
        n = len(run.row_lengths) or run.n_blocks
        wanted = slice(row, row + n)
        row += n
        if run.row_lengths:
            parts.append(_attend_bundles(q, k, v, packed, run, scoring, edge.tokens[wanted]))
            continue
        begin, width = _reach(run, len(k))
        bias = None
        if not sees_all or width > run.length:
            place = 0 if edge.which == "first" else run.length - 1
            bias = _bias(packed, _Scores(run, range(place, place + 1), begin, width), scoring, q)
        keys, values = (_for_heads(_blocks(part, run, begin, width), q.shape[1]) for part in (k, v))
        out = F.scaled_dot_product_attention(
            asking[wanted, :, None],
            keys,
            values,
            attn_mask=bias,
            scale=scoring.scale,
            enable_gqa=keys.shape[1] != q.shape[1],
        )
        parts.append(out.flatten(1))
    if len(asking) > row:
        parts.append(q.new_zeros(len(asking) - row, parts[0].shape[1]))
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class _Bundles:
    """How the rows of a run lie in bundles.

    Attributes:
        tokens: which token is in each place, int64 `[bundles * places]`; in one that is left over, the run's first.
        places: where each token is, int64 `[tokens]`; those of no row that follow the run are where its first is.
        bias: what is added to scores, `[bundles, 1 or heads, places, places]`.
    """

    tokens: Tensor
    places: Tensor
    bias: Tensor


def _attend_bundles(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, run: Run, scoring: Scoring, asking: Tensor | None = None
) -> Tensor:
    """What `asking`, tokens of the run, mix; without them all of it, and the tokens of no row that follow it."""
    if (run.start, scoring.window) not in packed.kept:
        packed.kept[run.start, scoring.window] = _bundled(packed, run, scoring, q)
    bundles: _Bundles = packed.kept[run.start, scoring.window]
    size = (run.n_blocks, run.length, -1, q.shape[2])
    # Not by `[]`, which takes eight times as long (`benchmarks/attention.py`).
    queries, keys, values = (part.index_select(0, bundles.tokens).view(size).transpose(1, 2) for part in (q, k, v))
    keys, values = _for_heads(keys, q.shape[1]), _for_heads(values, q.shape[1])
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=bundles.bias,
        scale=scoring.scale,
        enable_gqa=keys.shape[1] != q.shape[1],
    )
    places = bundles.places if asking is None else bundles.places[asking - run.start]
    return out.transpose(1, 2).reshape(-1, q.shape[1] * q.shape[2]).index_select(0, places)


def _bundled(packed: Packed, run: Run, scoring: Scoring, like: Tensor) -> _Bundles:
    """Lay the rows of a run in bundles; `like` is `[tokens, …]`, those of no row included."""
    begins, _ = places_of(run.row_lengths, run.length)
    lengths = np.array(run.row_lengths)
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    first_tokens = np.cumsum(lengths) - lengths
    own = np.arange(len(numbers)) + (np.array(begins) - first_tokens)[numbers]
    further = len(like) - run.stop if run.stop == packed.n_tokens else 0
    tokens = np.zeros((run.n_blocks, run.length), dtype=np.int64)
    tokens.flat[own] = run.start + np.arange(len(numbers))
    rows = np.full(tokens.shape, -1)  # places that are left over see each other, so that all is finite
    rows.flat[own] = numbers
    tokens = np.where(rows < 0, tokens[:, :1], tokens)  # of their own bundle, so that no row spoils another's
    token, row = (torch.from_numpy(each).to(like.device) for each in (tokens, rows))
    hidden = row[:, :, None] != row[:, None, :]
    place = torch.arange(run.length, device=like.device)
    after = place - place[:, None]  # how many places a key comes after its query
    if scoring.causal:
        hidden = hidden | (after > 0)
        if scoring.window is not None:
            hidden = hidden | (-after >= scoring.window)
    if packed.unseen is not None:
        hidden = hidden | packed.unseen[token][:, None, :]
    near = torch.zeros(1, 1, 1, device=like.device) if scoring.nearness is None else scoring.nearness(after)
    bias = torch.where(hidden[:, None], float("-inf"), near).to(like.dtype)
    places = torch.from_numpy(np.concatenate([own, np.full(further, own[0])])).to(like.device)
    return _Bundles(token.flatten(), places, bias)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, packed: Packed, run: Run, scoring: Scoring) -> Tensor:
    if run.row_lengths:
        return _attend_bundles(q, k, v, packed, run, scoring)
    n_asking, n_heads = run.length, q.shape[1]
    if run.n_blocks == 1 and run.stop == packed.n_tokens and run.length < _PRODUCT_TOKENS:
        n_asking = len(q) - run.start  # tokens of no row ask too, so that nothing is filled up afterwards
    queries = _blocks(q, run, run.start, n_asking)
    plain = scoring.nearness is None and packed.unseen is None
    sees_all = plain and (scoring.window is None or scoring.window >= run.length)
    if sees_all and scoring.causal and run.length > _CAUSAL_BIAS_TOKENS:
        keys, values = (_for_heads(_blocks(part, run, run.start, run.length), n_heads) for part in (k, v))
        grouped = keys.shape[1] != n_heads
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scoring.scale, enable_gqa=grouped
        )
    else:
        begin, width = _reach(run, len(k))
        keys, values = (_for_heads(_blocks(part, run, begin, width), n_heads) for part in (k, v))
        grouped = keys.shape[1] != n_heads
        out_blocks = []
        for first in range(0, n_asking, _QUERY_BLOCK):
            last = min(first + _QUERY_BLOCK, n_asking)
            bias = None
            if scoring.causal or not plain or width > run.length:
                bias = _bias(packed, _Scores(run, range(first, last), begin, width), scoring, q)
            block = queries[:, :, first:last]
            out_blocks.append(
                F.scaled_dot_product_attention(
                    block, keys, values, attn_mask=bias, scale=scoring.scale, enable_gqa=grouped
                )
            )
        out = out_blocks[0] if len(out_blocks) == 1 else torch.cat(out_blocks, dim=2)
    return out.transpose(1, 2).reshape(run.n_blocks * n_asking, -1)


def _attend_run_in_products(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, run: Run, scoring: Scoring, mixed: Tensor
) -> None:
    """Write what the run's tokens mix, in their places of `mixed`, which is as `q`."""
    n_kv, length = k.shape[1], run.length
    scale = 1 / math.sqrt(q.shape[-1]) if scoring.scale is None else scoring.scale
    # Of each key head, what it serves lies together; keys and values are filled up to whole lanes.
    queries = _blocks(q, run, run.start, length).unflatten(1, (n_kv, -1)).flatten(0, 1)
    keys, values = (_blocks(part, run, run.start, length) for part in (k, v))
    if more := -length % LANES:  # filling up with nothing is a copy too
        keys, values = (F.pad(part, (0, 0, 0, more)) for part in (keys, values))
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    places = _blocks(mixed, run, run.start, length).unflatten(1, (n_kv, -1))
    out = torch.empty_like(queries) if run.n_blocks > 1 else places[0]
    for first in range(0, length, _PRODUCT_QUERIES):
        last = min(first + _PRODUCT_QUERIES, length)
        end = -(-(last if scoring.causal else length) // LANES) * LANES
        # From which key on any is hidden, or scored by its place.
        changed = length
        if packed.unseen is not None or scoring.nearness is not None or scoring.window is not None:
            changed = 0
        elif scoring.causal:
            changed = first
        bias = None
        if changed < min(end, length):
            scores = _Scores(run, range(first, last), run.start + changed, end - changed)
            bias = _by_key_head(_bias(packed, scores, scoring, q), run.n_blocks, n_kv)
        block, unseen = slice(first, last), max(0, end - length)
        attend_in_products(queries[:, :, block], keys[:, :end], values[:, :end], out[:, :, block], bias, scale, unseen)
    if run.n_blocks > 1:
        places.copy_(out.view_as(places))


def _blocks(x: Tensor, run: Run, begin: int, width: int) -> Tensor:
    """Each block's `width` tokens, the first block's from token `begin` on: `[blocks, heads, width, head_dim]`.

    A view: blocks overlap where they are wider than the run's rows are long.
    """
    token, head, number = x.stride()
    size = (run.n_blocks, x.shape[1], width, x.shape[2])
    return x.as_strided(size, (run.length * token, head, token, number), x.storage_offset() + begin * token)


def _for_heads(blocks: Tensor, n_heads: int) -> Tensor:
    """Blocks of keys or values as the fused kernel takes them, `[blocks, kv_heads or heads, width, head_dim]`.

    On a GPU the kernel for float32 wants a copy for each query head; without it PyTorch writes all scores of a row.
    """
    if not blocks.is_cuda or blocks.shape[1] == n_heads:
        return blocks
    return blocks.repeat_interleave(n_heads // blocks.shape[1], dim=1)


def _reach(run: Run, n_tokens: int) -> tuple[int, int]:
    """Where a block's keys begin and how many there are.

    They reach into the neighbouring rows, which the bias hides, so that their number is a multiple of `KEY_LANES`.
    """
    width = -(-run.length // KEY_LANES) * KEY_LANES
    begin = min(run.start, n_tokens - width - (run.n_blocks - 1) * run.length)
    return (begin, width) if begin >= 0 else (run.start, run.length)


@dataclass(frozen=True, slots=True)
class _Scores:
    """A rectangle of attention scores of a run's blocks: some of its tokens by `width` keys from `begin` on."""

    run: Run
    queries: range
    begin: int
    width: int


def _bias(packed: Packed, scores: _Scores, scoring: Scoring, like: Tensor) -> Tensor:
    """`_score_bias`, computed once per batch for short runs and anew for long ones, where it would take much memory."""
    run = scores.run
    key = (scores, scoring.window)
    if key in packed.kept:
        kept: Tensor = packed.kept[key]
        return kept
    bias = _score_bias(scores, scoring, like)
    if packed.unseen is not None:
        # Each block has keys of its own that are hidden: `[blocks, 1, 1, keys]`.
        further = F.pad(packed.unseen, (0, scores.width))
        unseen = further.as_strided((run.n_blocks, scores.width), (run.length, 1), scores.begin)
        bias = torch.where(unseen[:, None, None, :], float("-inf"), bias)
    if run.length <= _QUERY_BLOCK:
        packed.kept[key] = bias
    return bias


def _by_key_head(bias: Tensor, n_blocks: int, n_kv: int) -> Tensor:
    """A bias `[blocks or 1, heads or 1, …]` as `[blocks * kv_heads or 1, group or 1, …]`."""
    if bias.shape[:2] == (1, 1):
        return bias
    by_head: Tensor = bias.expand(n_blocks, max(bias.shape[1], n_kv), -1, -1).unflatten(1, (n_kv, -1))
    return by_head.flatten(0, 1)


def _score_bias(scores: _Scores, scoring: Scoring, like: Tensor) -> Tensor:
    """What is added to scores: `[1, 1 or heads, 1 or queries, keys]`.

    A key out of sight, or of another row, gets minus infinity. The leading 1 matters: with three dimensions PyTorch
    leaves its fused kernel and writes all scores out.
    """
    run = scores.run
    keys = torch.arange(scores.width, device=like.device) + (scores.begin - run.start)
    asking = scores.queries
    # Tokens of no row ask as the last one of a row does: for something, so that all numbers stay finite.
    queries = torch.arange(asking.start, asking.stop, device=like.device).clamp_(max=run.length - 1)[:, None]
    hidden = ((keys < 0) | (keys >= run.length))[None]
    if scoring.causal:
        hidden = hidden | (keys > queries)
    if scoring.causal and scoring.window is not None:
        hidden = hidden | (queries - keys >= scoring.window)
    near = scoring.nearness
    bias = torch.zeros(1, 1, 1, device=like.device) if near is None else near(keys - queries)
    return torch.where(hidden, float("-inf"), bias).to(like.dtype)[None]
