"""From hidden states of packed tokens to one vector per row."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.packed import Packed, edge_of
from fundament.backbone.transformer import Transformer
from fundament.core import Array

Pooling = Literal["mean", "first", "last", "max", "root_mean", "weighted_mean"]


def pool(hidden: Tensor, packed: Packed, pooling: Pooling) -> Tensor:
    """One float32 vector per row, `[rows, hidden]`, not normalised.

    Args:
        hidden: `[tokens, hidden]`.
        packed: where rows begin and end.
        pooling: the mean over all tokens, special tokens included; the first token (CLS); the last; the greatest of
            each number; the sum over the root of the number of tokens (sentence-transformers' mean_sqrt_len_tokens);
            or a mean in which the n-th token weighs n (SGPT, Muennighoff 2022).
    """
    match pooling:
        case "mean":
            return torch.segment_reduce(hidden.float(), "mean", lengths=packed.lengths, unsafe=True)
        case "first":
            return hidden[packed.offsets[:-1]].float()
        case "last":
            return hidden[packed.offsets[1:] - 1].float()
        case "max":
            return torch.segment_reduce(hidden.float(), "max", lengths=packed.lengths, unsafe=True)
        case "root_mean":
            return pool(hidden, packed, "mean") * packed.lengths[:, None].float().sqrt()
        case "weighted_mean":
            places = packed.positions[: packed.n_tokens, None].float() + 1
            n = packed.lengths[:, None].float()
            return pool(hidden.float() * places, packed, "mean") * (2 / (n + 1))  # n weights of 1 to n, n (n + 1) / 2


def pooled(transformer: Transformer, packed: Packed, pooling: Pooling) -> Tensor:
    """The same of a batch that runs for nothing else: its last layer makes only the states that are pooled."""
    if pooling == "first" or pooling == "last":
        return transformer(packed, edge_of(packed, pooling)).float()
    return pool(transformer(packed), packed, pooling)


def pool_parts(hidden: Tensor, borders: Sequence[Array]) -> list[Array]:
    """The mean of each part of each row, float32 `[parts, hidden]`, of all rows at once.

    Args:
        hidden: `[tokens, hidden]`.
        borders: of each row, where in `hidden` each of its parts begins, and the end, `[parts + 1]`.
    """
    if not borders:
        return []
    lengths = torch.from_numpy(np.concatenate([np.diff(row) for row in borders])).to(hidden.device)
    inside = torch.cat([hidden[int(row[0]) : int(row[-1])] for row in borders]).float()
    means = torch.segment_reduce(inside, "mean", lengths=lengths, unsafe=True).cpu().numpy()
    return np.split(means, np.cumsum([len(row) - 1 for row in borders[:-1]]))
