"""From hidden states of packed tokens to one vector per row."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.packed import Packed
from fundament.core import Array

Pooling = Literal["mean", "first", "last"]


def pool(hidden: Tensor, packed: Packed, pooling: Pooling) -> Tensor:
    """One float32 vector per row, `[rows, hidden]`, not normalised.

    Args:
        hidden: `[tokens, hidden]`.
        packed: where rows begin and end.
        pooling: the mean over all tokens, special tokens included; the first token (CLS); or the last.
    """
    match pooling:
        case "mean":
            return torch.segment_reduce(hidden.float(), "mean", lengths=packed.lengths, unsafe=True)
        case "first":
            return hidden[packed.offsets[:-1]].float()
        case "last":
            return hidden[packed.offsets[1:] - 1].float()


def pool_parts(hidden: Tensor, borders: Array) -> Tensor:
    """The mean of each part of one row, float32 `[parts, hidden]`.

    Args:
        hidden: the row's own states, `[tokens, hidden]`.
        borders: where each part begins, and the end, `[parts + 1]`.
    """
    lengths = torch.from_numpy(np.diff(borders)).to(hidden.device)
    inside = hidden[int(borders[0]) : int(borders[-1])].float()
    return torch.segment_reduce(inside, "mean", lengths=lengths, unsafe=True)
