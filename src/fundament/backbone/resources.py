"""What of the machine this process may use: cores and memory, as its control groups leave them to it."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

_DIVIDED = 65_536  # numbers of which PyTorch gives each core some, and no fewer than half as many
_GROUPS, _GROUPS_TOP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def n_cores() -> int:
    """CPU cores that this process may use: the machine's, its affinity, its control groups' quotas, the least."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        words = _words(group / "cpu.max") or [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(words) == 2 and all(map(str.isdigit, words)):
            found = min(found, int(words[0]) // int(words[1]))
    return max(1, found)


def use_cores(n: int) -> None:
    """Let the operators that the calling thread runs on a CPU divide over `n` cores."""
    torch.get_num_threads()  # a thread that has not asked before its first operator takes what another one set last
    torch.set_num_threads(n)


def start_helpers(n: int) -> tuple[set[int], set[int]]:
    """Let the operators that the calling thread runs divide over `n` cores, its helpers bound to some of them.

    A helper that sleeps is woken near the thread that wakes it, often on that thread's own core. There it waits until
    that thread is interrupted, which itself waits for the helper. So while it divides, the thread keeps off its
    helpers' cores.

    Returns:
        The cores for the thread to keep to while it divides, and while it does not; empty where there are too few, and
        where threads cannot be bound.
    """
    use_cores(n)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    if not 1 < n <= len(cores):
        return set(), set()
    own = set(sorted(cores)[::n])
    keep_to(cores - own)
    torch.zeros(n * _DIVIDED).add_(1)  # starts the helpers, which stay where their thread was then
    keep_to(cores)
    return own, cores


def keep_to(cores: set[int]) -> None:
    """Bind the calling thread to these cores, if any."""
    if cores:
        with suppress(OSError):  # not allowed, or other cores by now
            os.sched_setaffinity(0, cores)


def free_bytes(device: torch.device) -> int:
    """Memory that can be taken on a device now, in bytes; on a CPU, no more than its control groups allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(zip(words := _words(Path("/proc/meminfo")), words[1:], strict=False))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = int(fields["MemAvailable:"]) * 1024 if "MemAvailable:" in fields else pages
    for group in _control_groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            stat = dict(zip(words := _words(group / "memory.stat"), words[1:], strict=False))
            cached = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
            free = min(free, int(limit[0]) - int(used[0]) + cached)  # files' pages go for what is asked for
    return max(0, free)


def _control_groups(controller: str) -> Iterator[Path]:
    """This process's control group and those above it, in the kernel's second version of them or the first."""
    for line in _said(_GROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = _GROUPS_TOP / controller if controllers else _GROUPS_TOP
        own = top / path.strip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(top))


def _words(path: Path) -> list[str]:
    return _said(path).split()


def _said(path: Path) -> str:
    """What a file of the kernel's says; nothing where this system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
