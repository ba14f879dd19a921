"""What this machine has: memory under its limits, cores, disk."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
CACHE_LINE = 64


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


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


def aligned_bytes(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Uninitialized memory that begins at a cache line; its `base` owns it. The system hands out large arrays as zero
    pages, which cost memory when they are written."""
    raw = np.empty(nbytes + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + nbytes]


def own_pages(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Zeros in pages that nothing else uses: they cost memory when they are written, and go with the array."""
    pages = mmap.mmap(-1, max(nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.ndarray(nbytes, np.uint8, pages)


def give_back(address: int, nbytes: int) -> None:
    """Return the whole pages among these bytes of anonymous memory to the system; they read as zeros from then on."""
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-address // page) * page, (address + nbytes) // page * page
    if start < end and _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise")


def trim_heap() -> None:
    """Return what the allocator keeps of freed memory to the system, where the C library can (glibc)."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def peak_resident() -> int:
    """The most bytes this process ever had in memory."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def read_pages(mapped: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Bring the pages behind these bytes of a mapped file into memory, without holding the interpreter's lock. Raises
    OSError if they cannot be read."""
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = mapped.ctypes.data // page * page, mapped.ctypes.data + mapped.nbytes
    if _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_POPULATE_READ):
        if ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        mapped[::page].max()  # Linux before 5.14


def usable_cores() -> int:
    """Cores this process may run on: its affinity mask and the cgroups' CPU quota."""
    cores = len(os.sched_getaffinity(0))
    for folder in _cgroup_folders("cpu"):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, use that cannot be reclaimed) of every cgroup with a memory limit, from this process's up to the root."""
    limits = []
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:  # v1 writes "no limit" as a huge number
            fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            cache = sum(int(fields.get(f"total_{k}", fields.get(k, 0))) for k in ("inactive_file", "active_file"))
            limits.append((int(limit), max(0, int(used) - cache)))
    return limits


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's cgroup for a controller, innermost first: version 2, else version 1."""
    paths = {}
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, names, path = line.split(":", 2)
        paths.update(dict.fromkeys(names.split(","), path.lstrip("/")))
    if controller in paths:
        root, path = Path("/sys/fs/cgroup") / controller, paths[controller]
    elif "" in paths:
        root, path = Path("/sys/fs/cgroup"), paths[""]
    else:
        return []
    inner = root / path
    if not inner.exists():  # inside a container the path may be the host's; the mount shows only our part
        inner = root
    return [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
