"""Files that are written once, whole and checked, by one process at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from chandra.errors import DigestMismatch, DiskFull, StoreError
from chandra.lazy import filelock, hashlib
from chandra.memory.device import format_size

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in all (0: unknown)

CHUNK = 1 << 20
MARGIN = 16 << 20  # bytes of a disk that are left alone
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns the system's errors of a write below `path` into ours."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # a library's own kind, such as a timeout of a lock
        if error.errno in _FULL:
            raise DiskFull(
                f"no space left for {path.name}: {error.strerror}",
                f"free some space on the disk of {path.parent}; what is there is kept and the next try resumes",
            ) from error
        raise StoreError(
            f"cannot write {error.filename or path}: {error.strerror}",
            "check the permissions, or set CHANDRA_HOME to a folder that can be written",
        ) from error


@contextmanager
def locked(lock: Path, progress: Progress, phase: str) -> Iterator[None]:
    """Holds a lock between processes; says so while another one has it."""
    with storing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock)
        while True:
            try:
                held.acquire(timeout=0.2)
                break
            except filelock.Timeout:
                progress(f"{phase}: waiting for another process", 0, 0)
    try:
        yield
    finally:
        held.release()


class PartFile:
    """A file that grows as `path.part`, hashed on the way, and gets its name when it is whole."""

    def __init__(self, path: Path, progress: Progress, phase: str) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.part.open("r+b" if self.part.exists() else "w+b", buffering=0)
        self.hash = hashlib.sha256()
        self.size = 0
        self.etag = ""  # of the server that sent what is there, if this process asked it
        total = os.fstat(self.file.fileno()).st_size
        while chunk := self.file.read(CHUNK):
            self.hash.update(chunk)
            self.size += len(chunk)
            progress(f"{phase}: checking what is here", self.size, total)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def reserve(self, more: int) -> None:
        """Raises DiskFull if the disk has no room for so many more bytes."""
        import shutil  # here: it brings five other modules

        free = shutil.disk_usage(self.path.parent).free
        if more + MARGIN > free:
            raise DiskFull(
                f"no space for {self.path.name}: {format_size(more)} more are needed, {format_size(free)} are free",
                f"free {format_size(more + MARGIN - free)} on the disk of {self.path.parent}, or set CHANDRA_HOME; "
                f"{format_size(self.size)} are kept",
            )

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with storing(self.path):
            while view:
                written = self.file.write(view)
                self.hash.update(view[:written])
                self.size += written
                view = view[written:]

    def restart(self) -> None:
        """Forgets what is there."""
        self.file.seek(0)
        self.file.truncate()
        self.hash, self.size = hashlib.sha256(), 0

    def commit(self, sha256: str | None) -> None:
        """Names the file. Raises DigestMismatch, and drops it, if its SHA-256 is not as promised."""
        if sha256 is not None and self.hash.hexdigest() != sha256:
            self.file.close()
            self.part.unlink()
            raise DigestMismatch(
                f"{self.path.name}: the SHA-256 is {self.hash.hexdigest()}, not {sha256}",
                "the file was dropped; try again, and if it happens again, the source or a proxy alters it",
            )
        with storing(self.path):
            os.fsync(self.file.fileno())
            self.file.close()
            self.part.replace(self.path)
