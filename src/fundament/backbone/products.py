"""Attention as two matrix products, queries with keys and weights with values, in pieces that stay in the caches.

On a CPU that multiplies bfloat16 and has no matrix tiles, PyTorch's fused kernel runs at the rate of float32, and a
batched product several times as fast (`benchmarks/attention.py`).
"""

from functools import cache

import torch
from torch import Tensor

LANES = 32
"""Keys come in multiples of so many: the CPU's softmax takes what is left over number by number."""

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


def attend_in_products(q: Tensor, keys: Tensor, values: Tensor, out: Tensor, bias: Tensor | None, scale: float) -> None:
    """Scaled dot-product attention of a batch of key heads, each of which serves a group of query heads.

    Scores are rounded to the number format, as queries and keys are before. In bfloat16 that makes the error of the
    result 1.3 to 1.5 times what their rounding makes it (`benchmarks/attention.py`), twice where scores are large.

    Args:
        q: `[batch, group, queries, head_dim]`.
        keys: `[batch, keys, head_dim]`.
        values: as `keys`.
        out: the result, as `q`.
        bias: what is added to the scores of the last so many keys, `[batch or 1, group or 1, queries or 1, last keys]`.
        scale: what scores are multiplied by.
    """
    n_batch, n_group, n, _ = q.shape
    n_keys = keys.shape[1]
    step = max(1, _SCORE_BYTES // (q.element_size() * n_group * n * n_keys))
    nothing = q.new_empty(1, 1, 1)
    for first in range(0, n_batch, step):
        part = slice(first, first + step)
        # A transposed view of what is not contiguous would be copied number by number.
        across = keys[part].contiguous().transpose(1, 2)
        scores = torch.baddbmm(nothing, q[part].flatten(1, 2), across, beta=0, alpha=scale)
        if bias is not None:
            added = bias[part] if len(bias) > 1 else bias
            scores.unflatten(1, (n_group, n))[..., n_keys - bias.shape[-1] :] += added
        out[part] = torch.bmm(torch.softmax(scores, dim=-1), values[part]).unflatten(1, (n_group, n))
