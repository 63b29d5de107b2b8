"""Cores and memory that control groups leave to this process."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fundament.backbone import resources


@pytest.mark.parametrize(
    ("groups", "files", "cores", "free"),
    [
        ("0::/", {"cpu.max": "100000 100000", "memory.max": "900", "memory.current": "300"}, 1, 600),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1, None),
        ("0::/a/b", {"a/memory.max": "500", "a/memory.current": "200", "memory.max": "max"}, None, 300),
        ("0::/a", {"a/memory.max": "500", "a/memory.current": "700"}, None, 0),
        (
            "0::/a",
            {"a/memory.max": "500", "a/memory.current": "450", "a/memory.stat": "anon 50\ninactive_file 300"},
            None,
            350,
        ),
        ("0::/not/here", {"cpu.max": "50000 100000"}, 1, None),
        (
            "4:cpu,cpuacct:/a b\n3:memory:/a\n1:name=systemd:/a\n0::/",
            {
                "cpu/a b/cpu.cfs_quota_us": "100000",
                "cpu/a b/cpu.cfs_period_us": "100000",
                "memory/a/memory.limit_in_bytes": "800",
                "memory/a/memory.usage_in_bytes": "300",
                "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 200",
            },
            1,
            700,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ("", {}, None, None),
    ],
)
def test_control_groups_bound_cores_and_memory(
    groups: str,
    files: dict[str, str],
    cores: int | None,
    free: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(8)))
    for name, text in files.items():
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_text(f"{text}\n")
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(resources, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resources, "_GROUPS_TOP", tmp_path / "top")
    assert resources.n_cores() == (8 if cores is None else cores)
    found = resources.free_bytes(torch.device("cpu"))
    assert found > 1_000_000 if free is None else found == free


BINDS = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to cores here")


@BINDS
@pytest.mark.skipif(resources.n_cores() < 2, reason="there is one core")
def test_a_thread_that_divides_keeps_off_its_helpers_cores() -> None:
    def threads() -> set[int]:
        return {int(path.name) for path in Path("/proc/self/task").iterdir()}

    def bound() -> list[object]:
        resources.use_cores(2)  # PyTorch has another pool, which gets its threads with this
        before = threads()
        own, cores = resources.start_helpers(2)
        found = [os.sched_getaffinity(0)]
        resources.keep_to(own)
        torch.ones(1 << 20).mul_(2)
        found += [os.sched_getaffinity(0), *(os.sched_getaffinity(thread) for thread in threads() - before)]
        resources.keep_to(cores)
        return [own, *found, os.sched_getaffinity(0)]

    cores = os.sched_getaffinity(0)
    with ThreadPoolExecutor(1) as thread:
        own, *found = thread.submit(bound).result()
    assert own
    assert found == [cores, own, cores - own, cores]
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("n", [1, 1_000])
def test_a_thread_without_helpers_or_with_more_than_cores_is_not_bound(n: int) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(resources.start_helpers, n).result() == (set(), set())
        assert thread.submit(torch.get_num_threads).result() == n


@BINDS
@pytest.mark.skipif(resources.n_cores() < 2, reason="there is one core")
def test_a_thread_that_may_not_bind_itself_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int, __: object) -> None:
        raise PermissionError

    monkeypatch.setattr(resources.os, "sched_setaffinity", refused)
    with ThreadPoolExecutor(1) as thread:
        own, _ = thread.submit(resources.start_helpers, 2).result()
        thread.submit(resources.keep_to, own).result()
        assert thread.submit(torch.get_num_threads).result() == 2
