"""What this process may use of the machine it runs on: memory and processors, by every account that limits them.

Owns the reading of /proc, cgroups (version 1 and 2, with all ancestors) and process limits. Changes nothing.
Invariant: an account that cannot be read does not limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes this process may still take on the host: the least of `memory_limits`."""
    return min(memory_limits(proc, cgroups).values())


def memory_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, int]:
    """What is free by each account that applies: "host", "cgroup", "address space" and "data segment".

    Page cache that the kernel would drop counts as free in all of them.
    """
    limits = {"host": _host_free(proc)}
    groups = [
        free
        for folder, version in _groups("memory", proc, cgroups)
        if (free := _group_free(folder, *_MEMORY_FILES[version])) is not None
    ]
    if groups:
        limits["cgroup"] = min(groups)
    return limits | _rlimits_free(proc)


def num_processors(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Processors this process may keep busy: those it may run on, or what its cgroups allow, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder, version in _groups("cpu", proc, cgroups) for quota in _group_quota(folder, version)]
    return min([allowed, *quotas])


_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def _groups(controller: str, proc: Path, cgroups: Path) -> Iterator[tuple[Path, int]]:
    """Folders of this process's cgroup and its ancestors for a controller, and the version they are of."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = cgroups, 2
        elif controller in controllers.split(","):
            root, version = cgroups / controller, 1
        else:
            continue
        # In a container the path may be the host's; then the files stand at the mount itself.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth]), version


def _group_free(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= 2**60:  # "max", or version 1's way to say it
        return None
    try:
        cache = _fields(folder / "memory.stat").get(cache_name, 0)
    except OSError:
        cache = 0
    return max(0, int(limit) - usage + cache)


def _group_quota(folder: Path, version: int) -> Iterator[int]:
    """The group's CPU time per period in processors, if it has a limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        if int(quota) > 0 and int(period) > 0:
            yield -(-int(quota) // int(period))
    except (OSError, ValueError):  # not there, or "max"
        return


def _host_free(proc: Path) -> int:
    try:
        return _fields(proc / "meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _rlimits_free(proc: Path) -> dict[str, int]:
    try:
        import resource

        status = _fields(proc / "self" / "status")
    except (ImportError, OSError):
        return {}
    free = {}
    for name, which, used in (
        ("address space", resource.RLIMIT_AS, "VmSize"),
        ("data segment", resource.RLIMIT_DATA, "VmData"),
    ):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY and used in status:
            free[name] = max(0, limit - status[used] * 1024)
    return free


def _fields(path: Path) -> dict[str, int]:
    """`Name: 123 kB` or `name 123` lines; what is no number is left out."""
    fields = {}
    for line in path.read_text().splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            fields[words[0]] = int(words[1])
    return fields
