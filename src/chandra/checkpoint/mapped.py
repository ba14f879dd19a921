"""A file mapped copy-on-write: weights are views of it, pages come when they are touched and can be let go."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from chandra.errors import CheckpointError, ModelNotFound


class MappedFile:
    """A read-only file as one uint8 array. The array is writable (privately), as torch wants it; writing is a fault.

    Raises ModelNotFound if there is no such file and CheckpointError if it is empty or cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._fd = os.dup(file.fileno())
                self.size = os.fstat(self._fd).st_size
                if self.size == 0:
                    os.close(self._fd)
                    raise CheckpointError(f"{path} is empty", "download it again")
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError as error:
            raise ModelNotFound(f"{path} does not exist", "check the path") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        self.bytes = memoryview(self._map)
        self.data: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._map, np.uint8)

    def view(self, start: int, nbytes: int, what: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes `start:start+nbytes`. Checks again that the file was not cut short since (a read past its end would
        kill the process). Raises CheckpointError."""
        size = os.fstat(self._fd).st_size
        if start + nbytes > min(size, self.size):
            raise CheckpointError(
                f"{self.path}: {what} is at bytes {start} to {start + nbytes}, but the file has {size} bytes",
                "it was cut short; download it again",
            )
        return self.data[start : start + nbytes]

    def release(self, start: int, nbytes: int) -> None:
        """Tell the system that the whole pages within this range are not needed for now."""
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + nbytes) // page * page
        if last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Give the descriptor back. The mapping goes when the last array that views it does."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
