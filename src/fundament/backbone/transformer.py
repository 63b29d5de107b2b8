"""One transformer for every text family, configured by data, run over packed rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.attention import Scoring, attend
from fundament.backbone.linear import Activation, Linear, LowRank
from fundament.backbone.packed import Edge, Packed, Span
from fundament.backbone.positions import Nearness, Rotation, alibi, bucketed, rotary_angles, rotate
from fundament.backbone.resources import use_cores
from fundament.errors import CheckpointError

_MOST_PACKED = 4  # layers that are packed at once: each of them holds a weight three times

Adapter = Mapping[str, LowRank]
"""What an adapter adds to which module, in the names of `parameters`: `layers.0.qkv`, `tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What makes one transformer differ from another; sizes in numbers of elements.

    Attributes:
        vocab: rows of the table of tokens; 0 where there is none, because others make the states.
        norm: layer normalisation with a bias, or root-mean-square without.
        pre_norm: norms before attention and MLP; otherwise after each residual sum.
        final_norm: with `pre_norm`, one more at the end.
        positions: a learned table, rotations of queries and keys, a bias that grows with distance (ALiBi), or None of
            them.
        n_positions: rows of the table of positions.
        position_offset: the first row of the position table in use: RoBERTa's kind starts at the one after that of
            the padding token's id, which such a token takes wherever a text spells it.
        n_buckets: rows of the table of a learned bias per bucket of distances, which T5 has in place of positions and
            MPNet beside them; 0 where there is none.
        max_distance: from where on all tokens are in the last bucket.
        n_types: rows of the token-type table; every token has type 0.
        attention_scale: what scores are multiplied by; None means `1 / sqrt(head_dim)`.
        qk_norm: normalise queries and keys per head, or over all heads together.
        window: of each layer, how many tokens a token sees at most; empty means all.
        gated: the MLP is `down(activation(gate(x)) * up(x))`, otherwise `down(activation(up(x)))`.
        inner_residual: JinaBERT's second residual sum and norm between attention and MLP.
        inner_norms: EVA02's norms of what attention mixed and of the MLP's inner states, before their output layers.
    """

    vocab: int
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float
    pre_norm: bool = False
    final_norm: bool = True
    positions: Literal["absolute", "rotary", "alibi"] | None = "absolute"
    n_positions: int = 0
    position_offset: int = 0
    n_buckets: int = 0
    max_distance: int = 0
    rope_theta: float = 10_000.0
    n_types: int = 0
    embedding_norm: bool = False
    causal: bool = False
    attention_scale: float | None = None
    window: tuple[int | None, ...] = ()
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: Literal["head", "all"] | None = None
    gated: bool = False
    activation: Activation = "gelu"
    up_bias: bool = True
    down_bias: bool = True
    inner_residual: bool = False
    inner_norms: bool = False

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value projections, which are laid one after the other."""
        kv = self.n_kv_heads * self.head_dim
        return self.n_heads * self.head_dim, kv, kv


def parameters(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape, linear weights as `[out, in]`."""
    q, kv, _ = shape.qkv_widths
    names: dict[str, tuple[int, ...]] = {"tokens.weight": (shape.vocab, shape.hidden)} if shape.vocab else {}

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        names[f"{name}.weight"] = (n_out, n_in)
        if bias:
            names[f"{name}.bias"] = (n_out,)

    def norm(name: str, size: int = shape.hidden) -> None:
        names[f"{name}.weight"] = (size,)
        if shape.norm == "layer":
            names[f"{name}.bias"] = (size,)

    if shape.positions == "absolute":
        names["positions.weight"] = (shape.n_positions, shape.hidden)
    if shape.n_buckets:
        names["distances.weight"] = (shape.n_buckets, shape.n_heads)
    if shape.n_types:
        names["types.weight"] = (shape.n_types, shape.hidden)
    if shape.embedding_norm:
        norm("embedding_norm")
    for i in range(shape.n_layers):
        layer = f"layers.{i}"
        linear(f"{layer}.qkv", q + 2 * kv, shape.hidden, shape.qkv_bias)
        if shape.qk_norm:
            norm(f"{layer}.q_norm", shape.head_dim if shape.qk_norm == "head" else q)
            norm(f"{layer}.k_norm", shape.head_dim if shape.qk_norm == "head" else kv)
        linear(f"{layer}.out", shape.hidden, q, shape.out_bias)
        norm(f"{layer}.attention_norm")
        if shape.inner_residual:
            norm(f"{layer}.inner_norm")
        if shape.inner_norms:
            norm(f"{layer}.mixed_norm", q)
            norm(f"{layer}.up_norm", shape.intermediate)
        if shape.gated:
            linear(f"{layer}.gate", shape.intermediate, shape.hidden, shape.up_bias)
        linear(f"{layer}.up", shape.intermediate, shape.hidden, shape.up_bias)
        linear(f"{layer}.down", shape.hidden, shape.intermediate, shape.down_bias)
        norm(f"{layer}.mlp_norm")
    if shape.pre_norm and shape.final_norm:
        norm("final_norm")
    return names


def adaptable(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The modules that an adapter may change: embeddings and linear layers, each with its weight's shape."""
    return {
        name.removesuffix(".weight"): sizes
        for name, sizes in parameters(shape).items()
        if len(sizes) == 2 and name not in ("positions.weight", "distances.weight")
    }


class Transformer:
    """Token ids in, hidden states out.

    Args:
        shape: what to build.
        weights: every tensor that `parameters(shape)` names, on one `device`, all but the layers' matrices in the
            `dtype` of the states. Each matrix is asked for once, and let go where the processor's own layout replaces
            it, so that a lazy mapping keeps one copy in memory.
        adapters: rows name them by their place here.

    Raises:
        CheckpointError: an adapter changes a module that cannot be changed, or that is not there.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], adapters: Sequence[Adapter] = ()) -> None:
        self.shape = shape
        changed = {name for adapter in adapters for name in adapter}
        if unknown := changed - adaptable(shape).keys():
            raise CheckpointError(f"adapters change what the model does not have: {', '.join(sorted(unknown))}")
        norm = weights["layers.0.attention_norm.weight"]
        self.device, self.dtype = norm.device, norm.dtype  # of states; the layers' weights may be float16
        self.tokens = weights["tokens.weight"] if shape.vocab else norm.new_empty(0, shape.hidden)
        self.positions: Tensor | None = None
        if shape.positions == "absolute":
            self.positions = weights["positions.weight"][max(0, shape.position_offset - 1) :]
        # Every token is of type 0, so its row is a constant that is added once, here.
        self.type = weights["types.weight"][0] if shape.n_types else None
        if self.positions is not None and self.type is not None:
            self.positions, self.type = self.positions + self.type, None
        self.embedding_norm = _Norm(shape, weights, "embedding_norm") if shape.embedding_norm else None
        self.token_terms = [adapter.get("tokens") for adapter in adapters]
        self.type_terms = [_type_of(adapter) for adapter in adapters]
        nearness: Nearness | None = None
        if shape.positions == "alibi":
            nearness = alibi(shape.n_heads, self.device)
        if shape.n_buckets:
            nearness = bucketed(weights["distances.weight"], shape.max_distance)
        self.layers = _built(partial(_Layer, shape, weights, adapters, nearness), shape.n_layers)
        n_matrices = sum(layer.n_elements for layer in self.layers)
        n_others = sum(map(math.prod, parameters(shape).values())) - n_matrices
        self.n_bytes = n_others * self.dtype.itemsize + n_matrices * self.layers[0].qkv.itemsize
        self.n_bytes += sum(term.n_bytes for adapter in adapters for term in adapter.values())
        self.final_norm = _Norm(shape, weights, "final_norm") if shape.pre_norm and shape.final_norm else None

    @torch.inference_mode()
    def __call__(self, packed: Packed, edge: Edge | None = None) -> Tensor:
        """Hidden states after the last layer (and its norm), `[tokens, hidden]`, or `[rows, hidden]` of an edge."""
        rotation = None
        if self.shape.positions == "rotary":
            rotation = rotary_angles(packed.positions, self.shape.head_dim, self.shape.rope_theta, self.dtype)
        return self.run(self.embed(packed), [packed] * self.shape.n_layers, rotation, edge)

    def embed(self, packed: Packed) -> Tensor:
        """What goes into the first layer, `[tokens, hidden]`, the tokens of no row at the end included."""
        x = F.embedding(packed.ids, self.tokens)
        for span in packed.spans:
            self._adapt_embeddings(x, packed.ids, span)
        if self.positions is not None:
            places = self._counted(packed) if self.shape.position_offset else packed.positions
            x = x + F.embedding(places, self.positions)
        if self.type is not None:
            x = x + self.type
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x

    def run(self, x: Tensor, packed: Sequence[Packed], rotation: Rotation | None, edge: Edge | None = None) -> Tensor:
        """The layers and the last norm over states that others may have changed or made.

        Args:
            x: as `embed` gives it.
            packed: of each layer, where rows begin and end: layers may divide the same tokens in different ways.
            rotation: of each token; None without rotary positions.
            edge: the tokens whose states are wanted, which spares the last layer the others; None means all.
        """
        *before, last = zip(self.layers, packed, strict=True)
        for layer, rows in before:
            x = layer(x, rows, rotation)
        layer, rows = last
        x = layer(x, rows, rotation, edge)
        x = x[: rows.n_tokens if edge is None else len(edge.offsets) - 1]
        return self.final_norm(x) if self.final_norm is not None else x

    def _counted(self, packed: Packed) -> Tensor:
        """Places from 1 on in each row, as RoBERTa's code counts them: a token of padding has place 0."""
        counts = packed.ids != self.shape.position_offset - 1
        ends = counts.cumsum(0)
        firsts = torch.arange(len(counts), device=counts.device) - packed.positions
        return (ends - (ends - counts.long())[firsts]) * counts

    def _adapt_embeddings(self, x: Tensor, ids: Tensor, span: Span) -> None:
        if (term := self.token_terms[span.adapter]) is not None:
            window = slice(*span.window)
            x[window].addmm_(span.only(F.embedding(ids[window], term.ups[0])), term.down)
        if (row := self.type_terms[span.adapter]) is not None:
            x[span.start : span.stop] += row


def require_decoder(transformer: Transformer, purpose: str) -> None:
    """Refuse what a kept key or value would not serve: only a causal, rotary transformer, norms first, is read on.

    Raises:
        CheckpointError: a transformer of another make, or with adapters.
    """
    shape = transformer.shape
    if not (shape.causal and shape.pre_norm and shape.positions == "rotary") or transformer.token_terms:
        raise CheckpointError(f"only causal transformers of Llama's make, without adapters, can {purpose}")


def _built(build: Callable[[int], "_Layer"], n_layers: int) -> "list[_Layer]":
    """The layers; where their weights are packed as float16, which is most of such a load, several at once."""
    first = build(0)
    if not first.qkv.halved:
        return [first, *map(build, range(1, n_layers))]
    n_threads = min(_MOST_PACKED, torch.get_num_threads())
    with ThreadPoolExecutor(n_threads, initializer=partial(use_cores, 1)) as pool:
        return [first, *pool.map(build, range(1, n_layers))]


def _type_of(adapter: Adapter) -> Tensor | None:
    """What the adapter adds to the row of type 0, `[hidden]`."""
    term = adapter.get("types")
    return None if term is None else term.ups[0][0] @ term.down


class _Norm:
    """Layer or root-mean-square normalisation over the last dimension."""

    def __init__(self, shape: Shape, weights: Mapping[str, Tensor], name: str) -> None:
        self.weight = weights[f"{name}.weight"]
        self.bias = weights[f"{name}.bias"] if shape.norm == "layer" else None
        self.eps = shape.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension (Zhang and Sennrich 2019), summed in float32.

    PyTorch's own is a row of operators on a CPU, and slower (`benchmarks/attention.py`).
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(torch.float32, copy=True)
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide.mul_(scale).mul_(weight).to(x.dtype)


class _Layer:
    def __init__(
        self,
        shape: Shape,
        weights: Mapping[str, Tensor],
        adapters: Sequence[Adapter],
        nearness: Nearness | None,
        i: int,
    ) -> None:
        self.shape = shape
        self.scoring = Scoring(
            causal=shape.causal,
            window=shape.window[i] if shape.window else None,
            nearness=nearness,
            scale=shape.attention_scale,
        )
        name = f"layers.{i}"

        def linear(part: str) -> Linear:
            module = f"{name}.{part}"
            terms = [adapter.get(module) for adapter in adapters]
            return Linear(weights[f"{module}.weight"], weights.get(f"{module}.bias"), terms)

        def norm(part: str) -> _Norm:
            return _Norm(shape, weights, f"{name}.{part}")

        self.qkv, self.out = linear("qkv"), linear("out")
        self.q_norm = norm("q_norm") if shape.qk_norm else None
        self.k_norm = norm("k_norm") if shape.qk_norm else None
        self.attention_norm, self.mlp_norm = norm("attention_norm"), norm("mlp_norm")
        self.inner_norm = norm("inner_norm") if shape.inner_residual else None
        self.mixed_norm = norm("mixed_norm") if shape.inner_norms else None
        self.up_norm = norm("up_norm") if shape.inner_norms else None
        self.gate = linear("gate") if shape.gated else None
        self.up, self.down = linear("up"), linear("down")

    @property
    def n_elements(self) -> int:
        """Numbers in its matrices."""
        return sum(part.n_elements for part in (self.qkv, self.out, self.gate, self.up, self.down) if part is not None)

    def __call__(self, x: Tensor, packed: Packed, rotation: Rotation | None, edge: Edge | None = None) -> Tensor:
        spans = packed.spans if edge is None else edge.spans
        going = x if edge is None else x[edge.tokens]
        if self.shape.pre_norm:
            x = self._attention(self.attention_norm(x), going, packed, rotation, edge)
            return self._mlp(self.mlp_norm(x), x, spans)
        attended = self.attention_norm(self._attention(x, going, packed, rotation, edge))
        if self.inner_norm is not None:
            attended = self.inner_norm(going + attended)
        return self.mlp_norm(self._mlp(attended, attended, spans))

    def _attention(
        self, x: Tensor, residual: Tensor, packed: Packed, rotation: Rotation | None, edge: Edge | None
    ) -> Tensor:
        q, k, v = self.heads(x, rotation, packed.spans)
        mixed = attend(q, k, v, packed, self.scoring, edge)
        if self.mixed_norm is not None:
            mixed = self.mixed_norm(mixed)
        return self.out.add(mixed, residual, packed.spans if edge is None else edge.spans)

    def heads(self, x: Tensor, rotation: Rotation | None, spans: Sequence[Span] = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[tokens, heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]` of `x`."""
        shape = self.shape
        heads = self.qkv(x, spans=spans).view(len(x), -1, shape.head_dim)
        # Not `split`, which is a wrapper in Python around this.
        q, k, v = heads.split_with_sizes((shape.n_heads, shape.n_kv_heads, shape.n_kv_heads), 1)
        if self.q_norm is not None and self.k_norm is not None:
            if shape.qk_norm == "head":
                q, k = self.q_norm(q), self.k_norm(k)
            else:
                q, k = (norm(part.flatten(1)).view_as(part) for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q, k, v

    def after_attention(self, mixed: Tensor, residual: Tensor) -> Tensor:
        """The rest of a layer whose norms come first, of any of its tokens: output projection, sums and MLP."""
        x = self.out.add(mixed, residual)
        return self._mlp(self.mlp_norm(x), x, ())

    def _mlp(self, x: Tensor, residual: Tensor, spans: Sequence[Span]) -> Tensor:
        if self.gate is None:
            inner = self.up(x, self.shape.activation, spans)
        else:
            inner = self.up.multiply(x, self.gate(x, self.shape.activation, spans), spans)
        if self.up_norm is not None:
            inner = self.up_norm(inner)
        return self.down.add(inner, residual, spans)
