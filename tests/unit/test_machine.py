"""What the process may use: every account is read, the least one counts."""

import os
import resource
from pathlib import Path

import pytest

from embedllm import machine
from embedllm.machine import free_memory, memory_limits, num_processors


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc with 8 GiB available and no limits; cgroup files go under `cg`."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cg").mkdir()
    write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemFree: 100 kB\nMemAvailable: 8388608 kB\n")
    write(tmp_path / "proc/self/status", "Name:\tpython\nVmSize:\t 2097152 kB\nVmData:\t 1048576 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limits(host: Path) -> dict[str, int]:
    return memory_limits(host / "proc", host / "cg")


def test_the_host_alone(host: Path) -> None:
    assert limits(host) == {"host": 8 * 2**30}
    assert free_memory(host / "proc", host / "cg") == 8 * 2**30


def test_cgroup_version_2_counts_every_ancestor(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/user/app\n")
    write(host / "cg/user/app/memory.max", "max\n")
    write(host / "cg/user/app/memory.current", "1000\n")
    assert limits(host) == {"host": 8 * 2**30}
    write(host / "cg/user/memory.max", f"{3 * 2**30}\n")
    write(host / "cg/user/memory.current", f"{2 * 2**30}\n")
    write(host / "cg/user/memory.stat", f"anon 5\ninactive_file {2**29}\nactive_file 7\n")
    assert limits(host)["cgroup"] == 2**30 + 2**29
    write(host / "cg/user/app/memory.max", f"{2**20}\n")
    assert limits(host)["cgroup"] == 2**20 - 1000
    assert free_memory(host / "proc", host / "cg") == 2**20 - 1000


def test_cgroup_version_1_in_a_container(host: Path) -> None:
    """The path is the host's, the files stand at the mount."""
    write(host / "proc/self/cgroup", "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n")
    write(host / "cg/memory/memory.limit_in_bytes", f"{2**30}\n")
    write(host / "cg/memory/memory.usage_in_bytes", f"{2**29}\n")
    write(host / "cg/memory/memory.stat", f"cache 1\ntotal_inactive_file {2**20}\n")
    assert limits(host)["cgroup"] == 2**29 + 2**20


def test_cgroup_version_1_without_a_limit(host: Path) -> None:
    write(host / "proc/self/cgroup", "4:memory:/\n")
    write(host / "cg/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(host / "cg/memory/memory.usage_in_bytes", "5\n")
    assert "cgroup" not in limits(host)


def test_a_cgroup_that_is_over_its_limit_has_nothing_free(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/\n")
    write(host / "cg/memory.max", "1000\n")
    write(host / "cg/memory.current", "5000\n")
    assert limits(host)["cgroup"] == 0


def test_rlimits(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {resource.RLIMIT_AS: 5 * 2**30, resource.RLIMIT_DATA: 2**30}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (given[which], -1))
    assert limits(host) == {"host": 8 * 2**30, "address space": 3 * 2**30, "data segment": 0}


def test_a_system_without_proc(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) > 0


def test_this_machine() -> None:
    found = memory_limits()
    assert 0 < found["host"] < 2**50
    assert free_memory() == min(found.values())
    assert machine.PROC.exists()
    assert 1 <= num_processors() <= len(os.sched_getaffinity(0))


# ---- processors -------------------------------------------------------------------------------------------------


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
def test_processors_without_a_quota(host: Path) -> None:
    assert num_processors(host / "proc", host / "cg") == 8
    write(host / "proc/self/cgroup", "0::/app\n3:cpu,cpuacct:/app\n")
    write(host / "cg/app/cpu.max", "max 100000\n")
    write(host / "cg/cpu/app/cpu.cfs_quota_us", "-1\n")
    write(host / "cg/cpu/app/cpu.cfs_period_us", "100000\n")
    assert num_processors(host / "proc", host / "cg") == 8


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("quota", "processors"), [(250_000, 3), (50_000, 1), (100_000, 1), (1_600_000, 8)])
@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_of_cpu_time(host: Path, quota: int, processors: int, version: int) -> None:
    if version == 2:
        write(host / "proc/self/cgroup", "0::/user/app\n")
        write(host / "cg/user/app/cpu.max", "max 100000\n")
        write(host / "cg/user/cpu.max", f"{quota} 100000\n")
    else:
        write(host / "proc/self/cgroup", "3:cpu:/docker/abc\n")
        write(host / "cg/cpu/cpu.cfs_quota_us", f"{quota}\n")
        write(host / "cg/cpu/cpu.cfs_period_us", "100000\n")
    assert num_processors(host / "proc", host / "cg") == processors
