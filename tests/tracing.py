"""CUDA without a GPU: what PyTorch takes for tensors of a GPU, with the CPU's numbers behind them.

PyTorch's fake tensors have a device, a number format and a shape. An operator checks of them that they are on one
device and that shapes go together. That formats do is checked here, since its stand-in leaves that to kernels. Then it
runs on the CPU, by a kernel of the CPU's: so numbers come out of what the code does where it believes to be on a GPU.
Where the host waits for the device, it is counted.
"""

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # which makes its operator known
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fundament.backbone import checkpoint
from fundament.backbone.checkpoint import Checkpoint

# With its number: a CPU build cannot say which device of CUDA's is the current one.
CUDA = torch.device("cuda:0")

_CUDA, _META = 1, 14  # of c10::DeviceType
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry

# Operators whose kernels take tensors of one number format only.
_ONE_FORMAT = {
    *("linear", "matmul", "mm", "bmm", "baddbmm", "addmm", "addmm_", "conv1d", "convolution"),
    *("scaled_dot_product_attention", "_varlen_attn", "layer_norm", "rms_norm", "searchsorted"),
    *("index_put_", "_index_put_impl_", "segment_reduce"),
}
_OF_CPUS = ("mkldnn", "mkl", "onednn", "quantized")  # namespaces of operators
_VARLEN = torch.ops.torch_attn._varlen_attn.default
_SCALARS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default}


class Waits(TorchDispatchMode):
    """Counts where the host waits for the device, by what for, and refuses operators of CPUs alone.

    Attributes:
        found: `download`, `scalar` and `nonzero`.
        operators: how often each ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        assert func.namespace not in _OF_CPUS, f"a GPU has no {func}"
        self.operators[str(func)] += 1
        name = func._schema.name.partition("::")[2]
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        formats = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        assert name not in _ONE_FORMAT or len(formats) <= 1, f"{func} takes tensors of one format, not {formats}"
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # else a number that is known would be sent to a device that is not there
        there = bool(args) and isinstance(args[0], Tensor) and args[0].is_cuda
        if there and func in _SCALARS:
            self.found["scalar"] += 1
            return _computed(func, args, kwargs)
        if there and func is torch.ops.aten.nonzero.default:
            self.found["nonzero"] += 1
            places = _computed(func, args, kwargs)
            return _behind(args[0].new_empty(places.shape, dtype=places.dtype), places)
        result = func(*args, **(kwargs or {}))
        if there and isinstance(result, Tensor) and not result.is_cuda:
            self.found["download"] += 1
        return tree_map(_behind, result, _computed(func, args, kwargs))


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """What an operator gives on the CPU."""
    with unset_fake_temporarily():
        args, kwargs = tree_map(_here, (tuple(args), dict(kwargs or {})))
        return _varlen_attn(*args, **kwargs) if func is _VARLEN else func(*args, **kwargs)


def _here(value: Any) -> Any:
    """The CPU's tensor behind a fake one, and its device in place of a GPU."""
    if isinstance(value, FakeTensor):
        return value.numbers
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _behind(fake: Any, numbers: Any) -> Any:
    """Lay the CPU's tensor behind a fake one."""
    if isinstance(fake, FakeTensor):
        assert (fake.shape, fake.dtype) == (numbers.shape, numbers.dtype)
        fake.numbers = numbers
    return fake


def _varlen_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float | None,
    window: Sequence[int],
    grouped: bool = False,
    *others: None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel for rows of any lengths, by what its documentation says: windows are counted from the ends."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    assert others == (None,) * len(others)
    assert causal == (tuple(window) == (-1, 0))
    n_queries, n_keys = query_offsets.diff().tolist(), key_offsets.diff().tolist()
    assert (max(n_queries), max(n_keys)) == (most_queries, most_keys)
    assert (sum(n_queries), sum(n_keys)) == (len(q), len(k))
    assert grouped == (q.shape[1] != k.shape[1])
    left, right = (math.inf if size < 0 else size for size in window)
    rows = []
    for row in zip(q.split(n_queries), k.split(n_keys), v.split(n_keys), strict=True):
        queries, keys, values = (part.transpose(0, 1) for part in row)
        ahead = torch.arange(keys.shape[1]) - torch.arange(queries.shape[1])[:, None]
        ahead = ahead - (keys.shape[1] - queries.shape[1])
        sees = (-left <= ahead) & (ahead <= right)
        mixed = F.scaled_dot_product_attention(queries, keys, values, sees, scale=scale, enable_gqa=grouped)
        rows.append(mixed.transpose(0, 1))
    return torch.cat(rows), q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


class Gpu:
    """A GPU that computes on the CPU: `with gpu.on() as waits` a model is loaded onto it, or runs."""

    def __init__(self) -> None:
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def on(self) -> Iterator[Waits]:
        """Make tensors fake."""
        with self._fakes, Waits() as waits:
            yield waits


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU that has all kernels."""
    monkeypatch.setattr(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy))
    monkeypatch.setattr(Checkpoint, "tensor", _real(Checkpoint.tensor))  # files are read in ways of their own
    monkeypatch.setattr(torch, "load", _real(torch.load))
    monkeypatch.setattr(checkpoint, "_let_go", lambda mapped: None)  # it asks where the numbers are
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with _indexable():
        yield Gpu()


def _numpy(plain: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(tensor: Tensor, **options: Any) -> Any:
        assert tensor.device.type == "cpu", "NumPy reads the host's memory"
        with unset_fake_temporarily():
            return plain(_here(tensor), **options)

    return numpy


def _real(plain: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return plain(*args, **options)

    return read


@contextmanager
def _indexable() -> Iterator[None]:
    """Indexing asks PyTorch for CUDA's device guard, which a CPU build lacks: meta's, which does nothing, stands in."""
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(ctypes.CDLL(str(library)), _GUARDS)
    before = guards[_CUDA]
    guards[_CUDA] = before or guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before
