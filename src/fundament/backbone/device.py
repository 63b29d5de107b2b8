"""Which device and which number format a model runs in."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from fundament.backbone.linear import Linear, multiplies_halves
from fundament.errors import FundamentError

_LAYER_WEIGHT = re.compile(r"layers\.\d+\.(qkv|[qkv]|out|gate|up|down)\.weight")
_LEAST_SPEED = 0.9  # of float16: half the memory is worth that much

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights live and in which number format.

    On a CPU, float16 is how the layers' weights are kept: they are multiplied in float32, and all else is float32.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def states(self) -> torch.dtype:
        """Number format of everything but the weights of the layers, and of what goes through them."""
        return torch.float32 if self.device.type == "cpu" and self.dtype == torch.float16 else self.dtype

    def dtype_of(self, parameter: str) -> torch.dtype:
        """Number format of a parameter of that name."""
        return self.dtype if of_a_layer(parameter) else self.states

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")


def of_a_layer(parameter: str) -> bool:
    """Whether a parameter of that name is the weight of a transformer layer's product."""
    return _LAYER_WEIGHT.fullmatch(parameter) is not None


@cache
def speeds() -> Mapping[torch.dtype, float]:
    """How many times as fast as float32's the products of each number format are on this CPU, measured now.

    Instructions alone do not tell: those of AVX512-BF16 have twice the rate of float32 on AMD's Zen 4, and half of it
    on an Intel Xeon whose AMX a virtual machine hides.
    """
    known = torch.cpu.get_capabilities()
    formats = [torch.float16] if multiplies_halves() else []
    if any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        formats.append(torch.bfloat16)
    if not formats:
        return {}
    with ThreadPoolExecutor(1) as apart:  # how many threads PyTorch has is kept for each of them
        return apart.submit(_speeds_of_a_core, formats).result()


def _speeds_of_a_core(formats: Iterable[torch.dtype]) -> dict[torch.dtype, float]:
    n_threads, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(1)
    seconds = dict.fromkeys((torch.float32, *formats), math.inf)
    layers = {
        dtype: (
            Linear(torch.ones(1024, 1024, dtype=dtype)),
            torch.ones(256, 1024, dtype=Placement(cpu, dtype).states),
        )
        for dtype in seconds
    }
    for _ in range(5):  # in turns, the best of each, of the thread's own time: others may want the core too
        for dtype, (layer, x) in layers.items():
            started = time.thread_time()
            layer(x)
            seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    torch.set_num_threads(n_threads)  # what threads to come begin with
    return {dtype: seconds[torch.float32] / seconds[dtype] for dtype in formats}


def fastest_format() -> Dtype:
    """The number format that this CPU multiplies fastest; float16 is taken for its half of the memory, too."""
    bfloat16, float16 = (speeds().get(dtype, 0) for dtype in (torch.bfloat16, torch.float16))
    if bfloat16 > max(1, float16):
        return "bfloat16"
    return "float16" if float16 >= _LEAST_SPEED else "float32"


def gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has instructions for bfloat16 products, as all have from Ampere on (compute capability 8.0).

    PyTorch's own `is_bf16_supported` says yes of older ones too, on which it emulates them.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def place(device: str, dtype: Dtype) -> Placement:
    """Resolve `auto`: CUDA where there is one; bfloat16 where a GPU multiplies it, else float32; a CPU's fastest.

    Raises:
        FundamentError: a device that is not there or not served, or float16 on a CPU that cannot multiply it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise FundamentError(f"device '{device}' is not a device; use 'auto', 'cpu' or 'cuda:0'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise FundamentError(f"device '{device}' is not served; use 'auto', 'cpu' or 'cuda:0'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise FundamentError(f"device '{device}' is not available: this PyTorch sees no CUDA device; use --device cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= (n_devices := torch.cuda.device_count()):
        raise FundamentError(
            f"device '{device}' is not there: this PyTorch sees {n_devices} of them, the last 'cuda:{n_devices - 1}'"
        )
    if chosen.type == "cpu" and dtype == "float16" and not multiplies_halves():
        raise FundamentError("float16 is not served on this CPU; use --dtype bfloat16 or float32")
    if dtype == "auto" and chosen.type == "cpu":
        dtype = fastest_format()
    elif dtype == "auto":
        dtype = "bfloat16" if gpu_multiplies_bfloat16(chosen) else "float32"
    return Placement(chosen, getattr(torch, dtype))
