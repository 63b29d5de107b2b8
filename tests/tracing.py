"""CUDA without a GPU: PyTorch's fake tensors have a device, a number format and a shape, and no numbers.

An operator checks of them that they are on one device and that shapes go together. That formats do is checked here,
since its stand-in leaves that to kernels. What wants numbers would wait for a device, and is counted.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

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
_SCALARS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default}


class Waits(TorchDispatchMode):
    """Counts where the host waits for the device, by what for, and refuses operators of CPUs alone.

    Where numbers decide on what comes next, it goes on as if they were ones: so are scalars, and one entry of a tensor
    is not zero.

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
            return 1
        if there and func is torch.ops.aten.nonzero.default:
            self.found["nonzero"] += 1
            return args[0].new_zeros((1, args[0].dim()), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        if there and isinstance(result, Tensor) and not result.is_cuda:
            self.found["download"] += 1
        return result


class Gpu:
    """A GPU without numbers: `with gpu.on() as waits` a model is loaded onto it, or runs."""

    def __init__(self) -> None:
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def on(self) -> Iterator[Waits]:
        """Make tensors fake."""
        with self._fakes, Waits() as waits:
            yield waits


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU that has all kernels; arrays that come from it are zeros."""
    monkeypatch.setattr(torch.Tensor, "numpy", _numpy(torch.Tensor.numpy))
    monkeypatch.setattr(Checkpoint, "tensor", _real(Checkpoint.tensor))  # its file is read in ways of its own
    monkeypatch.setattr(checkpoint, "_let_go", lambda mapped: None)  # it asks where the numbers are
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with _indexable():
        yield Gpu()


def _numpy(plain: Callable[..., Any]) -> Callable[..., Any]:
    def numpy(tensor: Tensor, **options: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            return plain(tensor, **options)
        assert tensor.device.type == "cpu", "NumPy reads the host's memory"
        with unset_fake_temporarily():
            return np.zeros(tuple(tensor.shape), plain(torch.empty(0, dtype=tensor.dtype)).dtype)

    return numpy


def _real(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def read(*args: Any) -> Tensor:
        with unset_fake_temporarily():
            return plain(*args)

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
