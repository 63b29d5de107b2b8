"""Attention as two matrix products, queries with keys and weights with values, in pieces that stay in the caches.

On a CPU that multiplies bfloat16 and has no matrix tiles, PyTorch's fused kernel runs at the rate of float32, and a
batched product several times as fast (`benchmarks/attention.py`).
"""

import math
import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 32
"""Keys and queries come in multiples of so many: the CPU's softmax takes what is left over number by number."""

_SCORE_BYTES = 2**22  # scores that are held at a time: few enough for the caches


@cache
def multiplies_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether two products are faster than the fused kernel."""
    known = torch.cpu.get_capabilities()
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and known.get("avx512_bf16", False)
        and not known.get("amx_bf16", False)
    )


def attend_in_products(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, bias: Tensor | None, scale: float, n_unseen: int = 0
) -> None:
    """Scaled dot-product attention of a batch of key heads, each of which serves a group of query heads.

    Scores are rounded to the number format, as queries and keys are before. In bfloat16 that makes the error of the
    result 1.3 to 1.5 times what their rounding makes it (`benchmarks/attention.py`), twice where scores are large.

    Products come in few shapes, whatever rows come: queries are filled up to whole lanes, and a step takes a power of
    two of key heads. oneDNN keeps what it compiled for each shape, half a megabyte of it.

    Args:
        q: `[batch, group, queries, head_dim]`.
        keys: `[batch, keys, head_dim]`.
        values: as `keys`.
        out: the result, as `q`.
        bias: what is added to the scores of the last so many keys, `[batch or 1, group or 1, queries or 1, last keys]`.
        scale: what scores are multiplied by.
        n_unseen: how many keys at the end no query sees.
    """
    n_batch, n_group, n_asked, _ = q.shape
    if more := -n_asked % LANES:
        q = F.pad(q, (0, 0, 0, more))
        bias = F.pad(bias, (0, 0, 0, more)) if bias is not None and bias.shape[2] > 1 else bias
    n, n_keys = n_asked + more, keys.shape[1]
    most = max(1, _SCORE_BYTES // (q.element_size() * n_group * n * n_keys))
    nothing = q.new_empty(1, 1, 1)
    stop = 0
    while stop < n_batch:
        first, stop = stop, stop + (1 << (min(most, n_batch - stop).bit_length() - 1))
        part = slice(first, stop)
        scores, weights = _room(q, stop - first, n_group * n, n_keys)
        # A transposed view of what is not contiguous would be copied number by number.
        across = keys[part].contiguous().transpose(1, 2)
        torch.baddbmm(nothing, q[part].flatten(1, 2), across, beta=0, alpha=scale, out=scores)
        if bias is not None:
            added = bias[part] if len(bias) > 1 else bias
            scores.unflatten(1, (n_group, n))[..., n_keys - bias.shape[-1] :] += added
        if n_unseen:
            scores[..., n_keys - n_unseen :] = -math.inf  # several times as fast as a bias
        torch.softmax(scores, dim=-1, out=weights)
        if out.is_contiguous() and not more:  # no copy: what is mixed goes where it stays
            torch.bmm(weights, values[part], out=out[part].flatten(1, 2))
        else:
            out[part] = torch.bmm(weights, values[part]).unflatten(1, (n_group, n))[:, :, :n_asked]


_kept = threading.local()


def _room(like: Tensor, *size: int) -> tuple[Tensor, Tensor]:
    """Memory for scores and for weights, which a thread keeps.

    Scores of a long row grow from step to step: asked for anew, each would leave a hole in the heap that is too small
    for the next.
    """
    n_bytes = like.element_size() * size[0] * size[1] * size[2]
    if not hasattr(_kept, "room") or len(_kept.room[0]) < n_bytes:
        with torch.inference_mode(False):  # usable in any mode
            _kept.room = [torch.empty(1 << (n_bytes - 1).bit_length(), dtype=torch.uint8) for _ in range(2)]
    scores, weights = (part[:n_bytes].view(like.dtype).view(size) for part in _kept.room)
    return scores, weights
