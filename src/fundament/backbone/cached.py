"""Causal rows that go on: each keeps the keys and values of what it has read, and reads further in the next pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fundament.backbone.causal import attend_last
from fundament.backbone.packed import rounded
from fundament.backbone.positions import rotary_angles
from fundament.backbone.transformer import Transformer, require_decoder


@dataclass(slots=True)
class Cache:
    """The keys and values of one row.

    Attributes:
        keys: `[layers, most, kv_heads, head_dim]`.
        values: as `keys`.
        n: tokens that have been read.
    """

    keys: Tensor
    values: Tensor
    n: int = 0


class CachedDecoder:
    """A causal transformer for rows that are read in several passes.

    Args:
        transformer: rotary, with its norms before attention and MLP, and without adapters.

    Raises:
        CheckpointError: a transformer of another make.
    """

    def __init__(self, transformer: Transformer) -> None:
        require_decoder(transformer, "write")
        shape = transformer.shape
        self.transformer = transformer
        self.token_bytes = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * transformer.dtype.itemsize

    def cache(self, most: int) -> Cache:
        """Room for a row of at most so many tokens."""
        shape, tokens = self.transformer.shape, self.transformer.tokens
        size = (shape.n_layers, most, shape.n_kv_heads, shape.head_dim)
        return Cache(tokens.new_empty(size), tokens.new_empty(size))

    @torch.inference_mode()
    def read(self, inputs: Sequence[Tensor], caches: Sequence[Cache]) -> Tensor:
        """The state of each row's last token after the last norm, `[rows, hidden]`.

        The caller counts the caches on, once nothing can fail any more, so that a pass that failed can be taken again.

        Args:
            inputs: what goes into the first layer for the next tokens of each row, `[tokens, hidden]`.
            caches: one per row.
        """
        transformer, shape = self.transformer, self.transformer.shape
        lengths = [len(row) for row in inputs]
        ends = np.cumsum(lengths).tolist()
        n, device = ends[-1], transformer.device
        n_more = rounded(n) - n if device.type == "cpu" else 0
        x = torch.cat([*inputs, inputs[0].new_zeros(n_more, shape.hidden)])
        counted = [np.arange(cache.n, cache.n + length) for cache, length in zip(caches, lengths, strict=True)]
        positions = torch.from_numpy(np.concatenate([*counted, np.zeros(n_more, dtype=np.int64)])).to(device)
        last = torch.tensor(ends, device=device) - 1  # before the layers: to send it, the host waits for what runs
        rotation = rotary_angles(positions, shape.head_dim, shape.rope_theta, x.dtype)
        for number, layer in enumerate(transformer.layers):
            q, k, v = layer.heads(layer.attention_norm(x), rotation)
            mixed = torch.zeros_like(q)
            for cache, end, length in zip(caches, ends, lengths, strict=True):
                row, read = slice(end - length, end), cache.n + length
                keys, values = cache.keys[number], cache.values[number]
                keys[cache.n : read], values[cache.n : read] = k[row], v[row]
                attend_last(q[row], keys[:read], values[:read], mixed[row], layer.scoring)
            x = layer.after_attention(mixed.flatten(1), x)
        assert transformer.final_norm is not None
        return transformer.final_norm(x[last])
