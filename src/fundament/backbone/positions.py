"""How a token knows its place: rotations, or a bias by distance. Absolute positions are a table of the checkpoint."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Nearness = Callable[[Tensor], Tensor]
"""What is added to attention scores for how many tokens a key comes after its query: int64 `[queries, keys]` to
`[heads, queries, keys]`."""


Rotation = tuple[Tensor, Tensor]
"""What `rotate` multiplies by: cosines of each token's angles, and their sines, those of the first half negated; both
`[tokens, 1, head_dim]`."""


def rotary_angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The rotation of each token by its position (RoFormer, Su et al. 2021, equation 34)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    return rotation_by(positions[:, None].float() * frequencies, dtype)


def rotation_by(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation by angles, float32 `[tokens, head_dim / 2]`; rounded once, as the reference implementations do."""
    cosines, sines = angles.cos(), angles.sin()
    wide = torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)
    return wide[0][:, None].to(dtype), wide[1][:, None].to(dtype)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn `[tokens, heads, head_dim]` by a `Rotation`; first half against second half, not interleaved."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1).mul_(sines).addcmul_(x, cosines)


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope of each head, float32 `[heads]` (ALiBi, Press et al. 2022, section 3)."""

    def powers(n: int) -> list[float]:
        start = 2.0 ** (-(2.0 ** -(math.log2(n) - 3)))
        return [start ** (k + 1) for k in range(n)]

    whole = 2 ** math.floor(math.log2(n_heads))
    slopes = powers(whole)
    if whole < n_heads:
        slopes += powers(2 * whole)[0::2][: n_heads - whole]
    return torch.tensor(slopes)


def alibi(n_heads: int, device: torch.device) -> Nearness:
    """ALiBi's bias, `-slope * distance`."""
    slopes = alibi_slopes(n_heads).to(device)[:, None, None]
    return lambda offsets: -slopes * offsets.abs()


def bucketed(table: Tensor, max_distance: int) -> Nearness:
    """T5's bias: one learned number per head and bucket of offsets (Raffel et al. 2020, section 2.1).

    From `max_distance` on, all offsets of one sign share a bucket, so a table of the nearer ones holds every bias.

    Args:
        table: `[buckets, heads]`.
        max_distance: in tokens.
    """
    nearer = torch.arange(-max_distance, max_distance + 1)
    by_offset = table.T[:, bucket(nearer, len(table), max_distance).to(table.device)].contiguous()
    return lambda offsets: by_offset[:, offsets.clamp(-max_distance, max_distance) + max_distance]


def bucket(offsets: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each offset, int64; the first half is for keys at or before their query, the second for later ones.

    Half of a sign's buckets hold one distance each, the others ever longer spans up to `max_distance`. The logarithms
    are those of float32, in which the published checkpoints were trained.
    """
    n_each = n_buckets // 2
    n_single = n_each // 2
    distances = offsets.abs()
    share = torch.log(distances.clamp(min=1).float() / n_single) / math.log(max_distance / n_single)
    wide = (n_single + (share * (n_each - n_single)).long()).clamp(max=n_each - 1)
    return torch.where(distances < n_single, distances, wide) + n_each * (offsets > 0)
