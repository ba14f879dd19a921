"""What this machine has: memory under its limits, cores, disk."""

from __future__ import annotations

import os
from pathlib import Path


def memory_limit() -> int:
    """Bytes of memory this process could ever use: physical memory, or the tightest cgroup limit above it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(limit for limit, _ in _cgroup_limits())])


def memory_available() -> int:
    """Bytes of host memory that can be taken now without swapping: MemAvailable, and what the cgroups still allow.

    Page cache that a cgroup is charged for counts as available: the kernel reclaims it before it refuses.
    """
    room = [limit - used for limit, used in _cgroup_limits()]
    return max(0, min([_meminfo("MemAvailable"), *room]))


def resident_bytes() -> tuple[int, int]:
    """(anonymous, file-backed) bytes of this process in memory, from /proc/self/status."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)

    def kib(name: str) -> int:
        return int(fields.get(name, "0 kB").split()[0]) * 1024

    return kib("RssAnon"), kib("RssFile") + kib("RssShmem")


def usable_cores() -> int:
    """Cores this process may run on: its affinity mask and the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders():
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, unreclaimable use) of every cgroup with a memory limit, from this process's up to the root."""
    limits = []
    for folder in _cgroup_folders():
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            cache = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
            limits.append((int(limit), max(0, int(used) - cache)))
    return limits


def _cgroup_folders() -> list[Path]:
    """cgroup v2 folders of this process, innermost first."""
    root = Path("/sys/fs/cgroup")
    own = next((line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), None)
    if own is None:
        return []
    inner = root / own.strip().lstrip("/")
    return [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
