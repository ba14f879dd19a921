"""Files mapped lazily, and what the readers share: bounds, errors, and tensors as views of the mapping."""

from __future__ import annotations

import json
import mmap
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chandra.checkpoint.base import TensorInfo
from chandra.errors import CheckpointError, ModelNotFound, UnsupportedError
from chandra.memory.host import read_pages
from chandra.quant import PackedWeight, get_format

MAX_ENTRIES = 100_000  # tensors, and metadata keys, of a file
MAX_JSON_MARKS = 2_000_000  # brackets and commas: they bound the memory that parsed JSON takes


class NeedMoreBytes(Exception):  # a signal between readers and downloads, not an error: no user sees it
    """A header goes on behind the bytes at hand: at least the first `nbytes` of the file are needed."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"the header needs the first {nbytes} bytes")
        self.nbytes = nbytes


@dataclass(frozen=True)
class Header:
    """What a file says about itself, checked: `offsets` of the tensors' bytes, and `nbytes` before the first of them,
    count from the start of the file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    nbytes: int


def damaged(file: object, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}", "the file is damaged or not what it claims to be; fetch it again")


def check_no_overlap(file: object, tensors: Mapping[str, TensorInfo], offsets: Mapping[str, int]) -> None:
    """Raises CheckpointError if two tensors share bytes."""
    end, before = 0, ""
    for name in sorted(offsets, key=lambda name: (offsets[name], tensors[name].nbytes)):
        if offsets[name] < end:
            raise damaged(file, f"tensor {name!r} at byte {offsets[name]} overlaps {before!r}, which ends at {end}")
        end, before = offsets[name] + tensors[name].nbytes, name


def parse_json(file: object, raw: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises CheckpointError."""
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_JSON_MARKS:
        raise damaged(file, f"its JSON has more than {MAX_JSON_MARKS} brackets and commas")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # the first covers bad UTF-8 and numbers of thousands of digits
        raise damaged(file, f"its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise damaged(file, f"a JSON object was expected, not a {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


class MappedFile:
    """A file mapped copy-on-write: views of it are writable, as torch wants them, and never reach the disk.

    Raises ModelNotFound if there is none, CheckpointError if it is empty or cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._closed = path, False
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path} is not a regular file", "give a model file, or the folder that holds it")
            with path.open("rb") as file:
                self.size = path.stat().st_size
                if not self.size:
                    raise damaged(path, "the file is empty")
                if sys.platform == "linux":  # without NORESERVE no file larger than the memory could be mapped so
                    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
                    self._map = mmap.mmap(file.fileno(), self.size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
                else:
                    self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFound(f"no such file: {path}", "check the path, or fetch the missing file") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(path)!r} cannot be read: {error}", "check its path and permissions") from None

    def view(self) -> memoryview:
        return memoryview(self._map)

    def array(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """These bytes of the file as a view. Raises CheckpointError if the file has shrunk: to touch pages behind its
        end would kill the process."""
        if self._closed:
            raise CheckpointError(f"{self.path} has been closed", "open the checkpoint again")
        if (size := self._map.size()) < self.size:
            raise damaged(self.path, f"the file had {self.size} bytes when it was opened and now has {size}")
        return np.frombuffer(self._map, np.uint8, nbytes, offset)

    def prefetch(self, offset: int, nbytes: int) -> None:
        """Read these bytes' pages into memory. Raises CheckpointError if the file has shrunk or cannot be read."""
        try:
            read_pages(self.array(offset, nbytes))
        except OSError as error:
            raise damaged(self.path, f"its bytes from {offset} on cannot be read: {error}") from None

    def release(self, offset: int, nbytes: int) -> None:
        """Drop the pages that lie wholly inside these bytes from the process; touched again, they are read again."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and not self._closed and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        if not self._closed:
            self.release(0, self.size)
        self._closed = True
        with suppress(BufferError):  # views are still alive: the mapping goes with the last of them
            self._map.close()


def list_folder(path: Path) -> list[str] | None:
    """The names in a folder, sorted; None if `path` is not a folder. Raises CheckpointError if it cannot be read."""
    try:
        return sorted(entry.name for entry in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}", "check its path and permissions") from None


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes. Raises CheckpointError, ModelNotFound."""
    file = MappedFile(path)
    if file.size > limit:
        raise damaged(path, f"{file.size} bytes are more than the {limit} that such a file may have")
    return bytes(file.view())


class MappedCheckpoint:
    """The `Checkpoint` of every reader: the tensors of one or more mapped files."""

    def __init__(
        self, kind: str, path: Path, metadata: Mapping[str, Any], parts: Iterable[tuple[MappedFile, Header]]
    ) -> None:
        self.kind, self.path, self.metadata = kind, path, metadata
        tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[MappedFile, int]] = {}
        self._headers: list[tuple[MappedFile, int]] = []
        for file, header in parts:
            self._headers.append((file, header.nbytes))
            for name, info in header.tensors.items():
                if name in tensors:
                    raise damaged(file.path, f"tensor {name!r} is also in {self._places[name][0].path.name}")
                tensors[name], self._places[name] = info, (file, header.offsets[name])
        self.tensors: Mapping[str, TensorInfo] = tensors

    def read(self, name: str) -> PackedWeight:
        """The tensor as a view of the mapped file, a scalar as one row of one; do not write to it.

        Raises CheckpointError for a name that is not there or a file that has shrunk, UnsupportedError for a format
        that Chandra cannot compute with.
        """
        (file, offset), info = self._place(name), self.tensors[name]
        try:
            packing = get_format(info.format)
        except UnsupportedError as error:
            raise UnsupportedError(f"{file.path}: tensor {name!r}: {error.message}", error.hint) from None
        shape = info.shape or (1,)
        (part,) = packing.parts(shape)
        return PackedWeight(packing, shape, {part.name: file.array(offset, info.nbytes).reshape(part.shape)})

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Read the pages of these bytes of a tensor into memory. Raises CheckpointError if that cannot be done."""
        file, offset = self._place(name)
        file.prefetch(offset + start, (self.tensors[name].nbytes if stop is None else stop) - start)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Drop the pages of these bytes of a tensor from the process; views stay valid and are read again when
        touched."""
        file, offset = self._place(name)
        file.release(offset + start, (self.tensors[name].nbytes if stop is None else stop) - start)

    def release_header(self) -> None:
        """The same for what stands before the tensors: metadata that lies there are read again when touched."""
        for file, nbytes in self._headers:
            file.release(0, nbytes)

    def views(self) -> list[memoryview]:
        """The mapped files, all bytes of each; to be let go of before `close`."""
        return [file.view() for file, _ in self._headers]

    def close(self) -> None:
        """Unmap the files; where views of tensors are alive, the mapping goes with the last of them."""
        for file, _ in self._places.values():
            file.close()

    def _place(self, name: str) -> tuple[MappedFile, int]:
        if name not in self._places:
            raise CheckpointError(f"{self.path} has no tensor {name!r}", "`chandra show -v` lists what it has")
        return self._places[name]
