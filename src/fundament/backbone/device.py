"""Which device and which number format a model runs in."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from fundament.backbone.linear import Linear
from fundament.errors import FundamentError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights live and in which number format they are multiplied."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")


@cache
def bfloat16_speed() -> float:
    """How many times as fast as float32 bfloat16 products are on this CPU, measured now; 0 without instructions.

    Instructions alone do not tell: those of AVX512-BF16 have twice the rate of float32 on AMD's Zen 4, and half of it
    on an Intel Xeon whose AMX a virtual machine hides.
    """
    known = torch.cpu.get_capabilities()
    if not any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return 0.0
    with ThreadPoolExecutor(1) as apart:  # how many threads PyTorch has is kept for each of them
        return apart.submit(_bfloat16_speed_of_a_core).result()


def _bfloat16_speed_of_a_core() -> float:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
    layers = {d: (Linear(torch.ones(1024, 1024, dtype=d)), torch.ones(256, 1024, dtype=d)) for d in seconds}
    for _ in range(10):  # in turns, the best of each, of the thread's own time: others may want the core too
        for dtype, (layer, x) in layers.items():
            started = time.thread_time()
            layer(x)
            seconds[dtype] = min(seconds[dtype], time.thread_time() - started)
    torch.set_num_threads(n_threads)  # what threads to come begin with
    return seconds[torch.float32] / seconds[torch.bfloat16]


def gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has instructions for bfloat16 products, as all have from Ampere on (compute capability 8.0).

    PyTorch's own `is_bf16_supported` says yes of older ones too, on which it emulates them.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def n_cores() -> int:
    """CPU cores that this process may use: the machine's, its affinity, its container's quota, whichever is least."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*_words("/sys/fs/cgroup/cpu.max"), "max", "max")[:2]
    return max(1, min(affinity, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else affinity


def use_cores(n: int) -> None:
    """Let the operators that the calling thread runs on a CPU divide over `n` cores."""
    torch.get_num_threads()  # a thread that has not asked before its first operator takes what another one set last
    torch.set_num_threads(n)


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device now, in bytes; on a CPU, no more than its container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(zip(words := _words("/proc/meminfo"), words[1:], strict=False))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(fields["MemAvailable:"]) * 1024 if "MemAvailable:" in fields else pages
    limit, used = _words("/sys/fs/cgroup/memory.max"), _words("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    return max(0, free)


def _words(path: str) -> list[str]:
    """The words of a file of the kernel's; none where this system has no such file."""
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def place(device: str, dtype: Dtype) -> Placement:
    """Resolve `auto`: CUDA where there is one, bfloat16 where the device multiplies it faster, float32 otherwise.

    Raises:
        FundamentError: a device that is not there or not served, or float16 on a CPU.
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
    if chosen.type == "cpu" and dtype == "float16":
        raise FundamentError("float16 is not served on a CPU; use --dtype bfloat16 or float32")
    if dtype == "auto":
        fast = gpu_multiplies_bfloat16(chosen) if chosen.type == "cuda" else bfloat16_speed() > 1
        dtype = "bfloat16" if fast else "float32"
    return Placement(chosen, getattr(torch, dtype))
