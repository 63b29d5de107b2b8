"""A linear layer whose weight is laid out once for the processor, with what follows it fused in.

On x86 CPUs oneDNN's own weight layout and fused products are reached through the operators that PyTorch's compiler
uses, and FBGEMM's products of float32 states and float16 weights through those of its quantization; everywhere else the
same arithmetic runs as separate operators.
"""

import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fundament.backbone.packed import Span
from fundament.errors import CheckpointError

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "silu", "relu", "tanh"]

_FUSED: dict[Activation, tuple[str, str]] = {  # activation → oneDNN's name and algorithm
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
    "tanh": ("tanh", ""),
}
_X86 = platform.machine() in ("x86_64", "AMD64")
_kept = threading.local()
_FUSED_BYTES = 1 << 20
"""Up to this size a residual or a gate is fused into a product: a larger one slows the product more than an operator of
its own costs (`benchmarks/attention.py`)."""

_BY_CONFIG: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def read_activation(name: str) -> Activation:
    """The activation that a checkpoint's `hidden_act` names.

    Raises:
        CheckpointError: one that is not served.
    """
    if name not in _BY_CONFIG:
        raise CheckpointError(f"hidden_act '{name}' is not served; known are {sorted(_BY_CONFIG)}")
    return _BY_CONFIG[name]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation as an operator of its own, in place: fresh memory for a batch's MLP costs more than it does."""
    match activation:
        case "gelu":
            torch.ops.aten.gelu_(x)
        case "gelu_tanh":
            torch.ops.aten.gelu_(x, approximate="tanh")
        case "gelu_quick":
            x.mul_(torch.sigmoid(1.702 * x))
        case "silu":
            F.silu(x, inplace=True)
        case "relu":
            x.relu_()
        case "tanh":
            x.tanh_()
    return x


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a weight, as thin matrices (LoRA, Hu et al. 2021, section 4.1).

    A weight that is several laid one after the other (queries, keys and values) has as many blocks, and each block its
    own `rank` rows of `down`.

    Attributes:
        down: `[blocks * rank, in]`, LoRA's A.
        ups: of each block, `[out of the block, rank]`, LoRA's B with the adapter's scale multiplied in.
    """

    down: Tensor
    ups: tuple[Tensor, ...]

    @property
    def n_bytes(self) -> int:
        """Memory that the matrices take."""
        return self.down.nbytes + sum(up.nbytes for up in self.ups)

    def add_to(self, y: Tensor, x: Tensor, span: Span) -> None:
        """Add `x @ (up @ down).T` to the span of `y`, in place; `x` is `[tokens, in]`, `y` is `[tokens, out]`."""
        window = slice(*span.window)
        inner = span.only(x[window] @ self.down.T).chunk(len(self.ups), dim=-1)
        outs = y[window].split([len(up) for up in self.ups], dim=-1)
        for out, part, up in zip(outs, inner, self.ups, strict=True):
            out.addmm_(part, up.T)


def onednn_lays_out(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of a number format on this CPU: of bfloat16, with AVX512 or AVX-NE-CONVERT alone."""
    if not _X86 or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_halves() -> bool:
    """Whether this CPU has products of float32 states and float16 weights: FBGEMM's, on x86 with AVX2."""
    return _X86 and "fbgemm" in torch.backends.quantized.supported_engines


def _widened(weight: Tensor) -> Tensor:
    """A weight in float32, in room that the next one of this thread takes: fresh room for each would leave holes."""
    if len(getattr(_kept, "room", ())) < weight.numel():
        _kept.room = torch.empty(weight.numel())
    room: Tensor = _kept.room
    return room[: weight.numel()].view_as(weight).copy_(weight)


def _own(weight: Tensor) -> Tensor:
    """A weight in this process's own memory, for who keeps it: one that lies in a file would change with that file."""
    in_memory = weight.device.type != "cpu" or weight.untyped_storage().resizable()  # a mapping has its size
    return weight if in_memory else weight.clone()


class Linear:
    """`activation(x @ weight.T + bias)`, `x @ weight.T + bias + residual`, or `(x @ weight.T + bias) * gate`.

    Every call takes the spans of its tokens that ask for an adapter; the weight of those is `weight + up @ down`.

    Args:
        weight: `[out, in]`, on its device and in its dtype; in float16 on a CPU, beside float32 for all else.
        bias: `[out]`, or None.
        terms: what each adapter adds to the weight; None where it leaves it alone.

    Raises:
        CheckpointError: a weight on a CPU that float16 cannot hold.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, terms: Sequence[LowRank | None] = ()) -> None:
        self.bias = bias
        self.terms = tuple(terms)
        on_cpu = weight.device.type == "cpu"
        self.halved = on_cpu and weight.dtype == torch.float16
        self.prepacked = on_cpu and not self.halved and onednn_lays_out(weight.dtype)
        self.weight: Any = weight
        self.n_elements, self.itemsize = weight.numel(), weight.element_size()
        self.n_bytes = weight.nbytes + (0 if bias is None else bias.nbytes) + sum(t.n_bytes for t in self.terms if t)
        if self.prepacked:
            self.weight = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), None)
        if self.halved:
            if not weight.isfinite().all():
                raise CheckpointError("a weight is larger than float16 can hold (65,504); use --dtype float32")
            self.weight = torch.ops.quantized.linear_prepack_fp16.default(_widened(weight), bias)
        if not self.prepacked and not self.halved:
            self.weight = _own(weight)

    def __call__(self, x: Tensor, activation: Activation | None = None, spans: Iterable[Span] = ()) -> Tensor:
        """`x` is `[tokens, in]`; returns `[tokens, out]`."""
        if touched := list(self._touched(spans)):
            y = self._adapt(self._unary(x, None), x, touched)
            return activate(y, activation) if activation else y
        return self._unary(x, activation)

    def add(self, x: Tensor, residual: Tensor, spans: Iterable[Span] = ()) -> Tensor:
        """`self(x) + residual`; `residual` is `[tokens, out]`."""
        return self._adapt(self._binary(x, residual, "add"), x, self._touched(spans))

    def multiply(self, x: Tensor, gate: Tensor, spans: Iterable[Span] = ()) -> Tensor:
        """`self(x) * gate`; `gate` is `[tokens, out]`."""
        if touched := list(self._touched(spans)):
            return self._adapt(self._unary(x, None), x, touched).mul_(gate)
        return self._binary(x, gate, "mul")

    def _touched(self, spans: Iterable[Span]) -> Iterator[tuple[Span, LowRank]]:
        return ((span, term) for span in spans if (term := self.terms[span.adapter]) is not None)

    def _adapt(self, y: Tensor, x: Tensor, touched: Iterable[tuple[Span, LowRank]]) -> Tensor:
        for span, term in touched:
            term.add_to(y, x, span)
        return y

    def _unary(self, x: Tensor, activation: Activation | None) -> Tensor:
        if activation and not (self.prepacked and activation in _FUSED):
            return activate(self._unary(x, None), activation)
        if self.prepacked:
            name, algorithm = _FUSED[activation] if activation else ("none", "")
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, name, [], algorithm)
            return y
        if self.halved:
            made: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, self.weight)
            return made
        return F.linear(x, self.weight, self.bias)

    def _binary(self, x: Tensor, other: Tensor, operation: Literal["add", "mul"]) -> Tensor:
        if self.prepacked and other.nbytes <= _FUSED_BYTES:
            fused = torch.ops.mkldnn._linear_pointwise.binary
            y: Tensor = fused(x, other, self.weight, self.bias, operation)
            return y
        y = self._unary(x, None)
        return y.add_(other) if operation == "add" else y.mul_(other)
