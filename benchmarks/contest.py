"""Contestants in turns: every round runs each of them once, so that what else the machine does hits all alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import ParamSpec, TypeVar

import torch

from fundament.backbone.device import Dtype, speeds
from fundament.backbone.linear import Linear
from fundament.backbone.resources import use_cores

P = ParamSpec("P")
T = TypeVar("T")


def rounds(contestants: Mapping[str, Callable[[], T]], n: int) -> dict[str, list[T]]:
    """What each contestant returned in each of `n` rounds; whoever goes first changes from round to round."""
    found: dict[str, list[T]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(n):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            found[name].append(contestants[name]())
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column flush left, the others flush right."""
    widths = [max(len(line[place]) for line in (head, *lines)) for place in range(len(head))]

    def laid(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells])

    print(f"\n{title}\n{laid(head)}\n{'  '.join('-' * width for width in widths)}")
    for line in lines:
        print(laid(line))


def verdict(what: str, value: float, sign: str, target: float, unit: str = "") -> None:
    """Print a figure beside its target. `sign` is `>=`, `<=` or `<`."""
    met = {">=": value >= target, "<=": value <= target, "<": value < target}[sign]
    print(f"{what}: {value:.6g}{unit}, target {sign} {target:g}{unit}: {'met' if met else 'MISSED'}")


def formats() -> list[Dtype]:
    """The number formats that this machine's CPU has products of."""
    known: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return [*(name for name, dtype in known.items() if dtype in speeds()), "float32"]


def machine() -> str:
    """The processor, in one line: figures travel with it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    known = torch.cpu.get_capabilities()
    has = [feature for feature in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2", "bf16") if known.get(feature)]
    return f"{n_cores()} cores, {name}, {' '.join(has)}, torch {torch.__version__}"


def apart(work: Callable[P, T]) -> Callable[P, T]:
    """The same in a thread of its own, on all cores.

    OpenMP's threads end with it. Kept, they would be more than cores, and the engine's would sleep after each operator.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ThreadPoolExecutor(1, initializer=partial(use_cores, n_cores())) as thread:
            return thread.submit(work, *args, **kwargs).result()

    return run


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product on a device, with the weight laid out as the device likes it."""
    n = 8192 if device.type == "cuda" else 2048

    def laps() -> list[float]:
        x, found = torch.randn(n, n, device=device, dtype=dtype), []
        product = Linear(x)
        for _ in range(10):
            started = time.perf_counter()
            float(product(x)[0, 0])  # waits for the device
            found.append(time.perf_counter() - started)
        return found

    return 2 * n**3 / median(apart(laps)())


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
