"""Causal rows of any length that may share their beginnings: a beginning runs once, a long row in slices.

Memory is bounded by design. A layer runs over slices of tokens and replaces them in place; for all tokens there are
only the states between layers and one layer's keys and values. The last layer gives the asked places alone.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.causal import attend_asked, attend_slice
from fundament.backbone.lru import LRU
from fundament.backbone.passes import Fill, Row, lay
from fundament.backbone.positions import rotary_angles
from fundament.backbone.transformer import Transformer, require_decoder

PREFIX_BYTES = 256 * 1024**2


class Decoder:
    """A causal transformer for rows that share beginnings.

    Args:
        transformer: rotary, with its norms before attention and MLP, and without adapters.
        prefix_bytes: most that the keys and values of beginnings take, those of one pass and those that are kept.

    Raises:
        CheckpointError: a transformer of another make.
    """

    def __init__(self, transformer: Transformer, prefix_bytes: int = PREFIX_BYTES) -> None:
        require_decoder(transformer, "share beginnings")
        shape = transformer.shape
        self.transformer = transformer
        self.prefixes: LRU[bytes, Tensor] = LRU(prefix_bytes)
        """By a prefix's bytes its keys and values, keys first: `[layers, 2, tokens, kv_heads, head_dim]`."""
        self.n_bytes = transformer.n_bytes + prefix_bytes
        token_bytes = 2 * shape.n_layers * shape.qkv_widths[1] * transformer.dtype.itemsize
        self.most_shared = prefix_bytes // token_bytes
        """Tokens of the longest beginning that can be kept."""

    @torch.inference_mode()
    def states(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the asked places of each row become, after the last norm: `[asked, hidden]`, in the given order."""
        found = [self.transformer.tokens[:0]] * len(rows)
        for places in self._passes(rows):
            together = [rows[place] for place in places]
            states = self._run(together).split([len(row.kept) for row in together])
            for place, state in zip(places, states, strict=True):
                found[place] = state
        return found

    def _passes(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Places of rows that run together: few enough different prefixes that all of them could be kept."""
        order = sorted(range(len(rows)), key=lambda place: rows[place].prefix.tobytes())
        together: list[int] = []
        room, last = self.most_shared, b""
        for place in order:
            prefix = rows[place].prefix
            if (key := prefix.tobytes()) != last:
                if together and len(prefix) > room:
                    yield together
                    together, room = [], self.most_shared
                room, last = room - len(prefix), key
            together.append(place)
        yield together

    def _run(self, rows: Sequence[Row]) -> Tensor:
        """The asked states of all rows, one after the other, `[asked, hidden]`."""
        transformer, shape = self.transformer, self.transformer.shape
        known = {key: found for row in rows if (found := self.prefixes.get(key := row.prefix.tobytes())) is not None}
        batch = lay(rows, known, transformer.device)
        x = F.embedding(batch.ids, transformer.tokens)
        cosines, sines = rotary_angles(batch.positions, shape.head_dim, shape.rope_theta, transformer.dtype)
        per_key = (shape.n_kv_heads, shape.head_dim)
        keys, values = (x.new_empty((batch.n_keys + 1, *per_key)) for _ in range(2))
        new = [x.new_empty((shape.n_layers, 2, len(ids), *per_key)) for ids, _ in batch.new]
        asked: list[Tensor] = []
        for number, layer in enumerate(transformer.layers):
            for part in batch.slices:
                residual = x[part.tokens]
                rotation = (cosines[part.tokens], sines[part.tokens])
                q, k, v = layer.heads(layer.attention_norm(residual), rotation)
                keys[batch.places[part.tokens]] = k
                values[batch.places[part.tokens]] = v
                for piece in part.pieces:
                    if piece.fill is not None:
                        _copy(piece.fill, number, keys, values)
                if number < shape.n_layers - 1:
                    mixed = attend_slice(q, keys, values, part, layer.scoring)
                    x[part.tokens] = layer.after_attention(mixed, residual)
                elif part.asked:
                    mixed = attend_asked(q, keys, values, part, layer.scoring)
                    asked.append(layer.after_attention(mixed, residual[part.kept]))
            for states, (_, lie) in zip(new, batch.new, strict=True):
                states[number, 0], states[number, 1] = keys[lie], values[lie]
        for states, (ids, _) in zip(new, batch.new, strict=True):
            self.prefixes.put(ids.tobytes(), states, states.nbytes)
        assert transformer.final_norm is not None
        return transformer.final_norm(torch.cat(asked))


def _copy(fill: Fill, layer: int, keys: Tensor, values: Tensor) -> None:
    """Put a prefix's keys and values before those of the rows that share it."""
    if fill.kept is not None:
        keys[fill.targets], values[fill.targets] = fill.kept[layer]
    else:
        assert fill.source is not None
        keys[fill.targets] = keys[fill.source].clone()
        values[fill.targets] = values[fill.source].clone()
