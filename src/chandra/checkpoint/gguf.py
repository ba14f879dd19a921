"""GGUF, versions 2 and 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Nothing in the file is believed: every count, length and offset is compared with the size of the file before anything
is allocated or read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chandra.checkpoint.base import TensorInfo
from chandra.checkpoint.mapped import MappedFile
from chandra.errors import ChandraError, CheckpointError, UnsupportedError
from chandra.quant import PackedWeight, format_of_ggml_type, get_format

MAGIC = b"GGUF"
MAX_STRING, MAX_ITEMS, MAX_DIMS, MAX_KEYS, MAX_TENSORS = 16 << 20, 64 << 20, 4, 1 << 16, 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MIN_KEY, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes the shortest entry takes


class NeedMoreBytes(ChandraError):
    """The header goes on past the bytes at hand; `nbytes` from the file's beginning are needed at least."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"the header needs at least {nbytes} bytes")
        self.nbytes = nbytes


@dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor with its place: `offset` bytes from the beginning of the file."""

    offset: int = 0


@dataclass(frozen=True)
class GGUFHeader:
    """All of a file but its weights. Strings that are not UTF-8 keep their bytes as surrogates (PEP 383)."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads forward through the header, checking each step against the end of the file."""

    def __init__(self, data: memoryview, file_size: int, name: str) -> None:
        self.data, self.file_size, self.name, self.pos = data, file_size, name, 0

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {message} (byte {self.pos})", "the file is damaged or not a GGUF file; download it again"
        )

    def need(self, nbytes: int, what: str) -> None:
        """Raises unless `nbytes` more are in the file, and at hand."""
        if nbytes > self.file_size - self.pos:
            raise self.fail(f"{what} needs {nbytes} bytes, the file has {self.file_size - self.pos} left")
        if nbytes > len(self.data) - self.pos:
            raise NeedMoreBytes(self.pos + nbytes)

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        value = struct.unpack_from("<" + code, self.data, self.pos)[0]
        self.pos += size
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        if length > MAX_STRING:
            raise self.fail(f"{what} is said to be {length} bytes long; the limit is {MAX_STRING}")
        self.need(length, what)
        text = bytes(self.data[self.pos : self.pos + length]).decode("utf-8", "surrogateescape")
        self.pos += length
        return text

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], f"value of {key}")
        if kind == _STRING:
            return self.string(f"value of {key}")
        if kind == _ARRAY:
            return self.array(key)
        raise self.fail(f"{key} has the unknown value type {kind}")

    def array(self, key: str) -> Any:
        kind, count = self.number("I", f"array {key}"), self.number("Q", f"array {key}")
        if count > MAX_ITEMS:
            raise self.fail(f"array {key} is said to have {count} items; the limit is {MAX_ITEMS}")
        if kind in _SCALARS:
            dtype = np.dtype(_DTYPES[kind])
            self.need(count * dtype.itemsize, f"array {key}")
            items = np.frombuffer(self.data, dtype, count, self.pos).copy()
            self.pos += count * dtype.itemsize
            return items
        if kind == _STRING:
            return self.strings(count, key)
        raise self.fail(f"array {key} has items of the unsupported type {kind}")

    def strings(self, count: int, key: str) -> list[str]:
        """A vocabulary may have a quarter of a million entries: no calls in this loop but the decoding itself."""
        self.need(8 * count, f"array {key}")
        data, pos, end, out = self.data, self.pos, len(self.data), []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if pos + 8 > end:
                break
            stop = pos + 8 + unpack(data, pos)[0]
            if stop > end or stop - pos > MAX_STRING:
                break
            out.append(str(data[pos + 8 : stop], "utf-8", "surrogateescape"))
            pos = stop
        self.pos = pos
        while len(out) < count:  # the loop above stopped early: read on with the checks that say what is wrong
            out.append(self.string(f"item {len(out)} of {key}"))
        return out


def read_header(data: bytes | memoryview, file_size: int, name: str = "the file") -> GGUFHeader:
    """Parse a header from the first bytes of a file of `file_size` bytes.

    Raises NeedMoreBytes if `data` ends before the header does, CheckpointError for anything that cannot be, and
    UnsupportedError for versions and tensor types that are not supported.
    """
    cursor = _Cursor(memoryview(data), file_size, name)
    cursor.need(24, "the header")
    if bytes(cursor.data[:4]) != MAGIC:
        raise cursor.fail(f"does not begin with GGUF but with {bytes(cursor.data[:4])!r}")
    cursor.pos = 4
    version = cursor.number("I", "version")
    if version in (1, 2 << 24, 3 << 24) or version not in (2, 3):
        what = "big-endian" if version >= 1 << 24 else f"version {version}"
        raise UnsupportedError(f"{name}: GGUF {what} is not supported", "convert it with the current llama.cpp tools")
    tensor_count, key_count = cursor.number("Q", "tensor count"), cursor.number("Q", "key count")
    room = file_size - cursor.pos
    if key_count > MAX_KEYS or key_count * _MIN_KEY > room:
        raise cursor.fail(f"{key_count} keys do not fit into the file")
    if tensor_count > MAX_TENSORS or tensor_count * _MIN_TENSOR > room:
        raise cursor.fail(f"{tensor_count} tensors do not fit into the file")
    metadata = _read_metadata(cursor, key_count)
    return GGUFHeader(version, metadata, _read_tensors(cursor, tensor_count, _alignment(cursor, metadata)))


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = cursor.string(f"key {index}")
        if key in metadata:
            raise cursor.fail(f"key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.number("I", f"type of {key!r}"), key)
    return metadata


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 8 <= alignment <= 1 << 20:
        raise cursor.fail(f"general.alignment is {alignment!r}")
    if alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment {alignment} is not a power of two")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    entries = []
    for index in range(count):
        name = cursor.string(f"name of tensor {index}")
        dims = cursor.number("I", f"dimensions of {name!r}")
        if not 1 <= dims <= MAX_DIMS:
            raise cursor.fail(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(cursor.number("Q", f"shape of {name!r}") for _ in range(dims))[::-1]
        type_id = cursor.number("I", f"type of {name!r}")
        entries.append((name, shape, type_id, cursor.number("Q", f"offset of {name!r}")))
    start = -(-cursor.pos // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise cursor.fail(f"tensor {name!r} stands twice")
        tensors[name] = _check_tensor(cursor, name, shape, type_id, start, offset, alignment)
    end = start
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name!r} at byte {tensor.offset} overlaps the one before it")
        end = tensor.offset + tensor.nbytes
    return tensors


def _check_tensor(
    cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, start: int, offset: int, alignment: int
) -> GGUFTensor:
    if 0 in shape or math.prod(shape) > 1 << 48:
        raise cursor.fail(f"tensor {name!r} has the impossible shape {shape}")
    fmt = format_of_ggml_type(type_id)
    if shape[-1] % fmt.block_size:
        raise cursor.fail(
            f"tensor {name!r}: rows of {shape[-1]} values are not blocks of {fmt.block_size} ({fmt.name})"
        )
    nbytes = fmt.nbytes(shape)
    if offset % alignment or start + offset + nbytes > cursor.file_size:
        raise cursor.fail(
            f"tensor {name!r} has {nbytes} bytes at byte {start + offset}; the file has {cursor.file_size}"
            f" and is aligned to {alignment}"
        )
    return GGUFTensor(name, shape, fmt.name, nbytes, start + offset)


class GGUFCheckpoint:
    """A GGUF file, or all shards of one. Opening any shard opens all."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, GGUFTensor] = {}
        self._files: list[MappedFile] = []
        self._file_of: dict[str, MappedFile] = {}
        try:
            for index, shard in enumerate(shard_paths(path)):
                header = self._open(shard)
                if index == 0:
                    self.metadata = header.metadata
        except Exception:
            self.close()
            raise
        count = self.metadata.get("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            self.close()
            raise CheckpointError(f"{path}: the shards have {len(self.tensors)} tensors instead of {count}")

    def _open(self, path: Path) -> GGUFHeader:
        file = MappedFile(path)
        self._files.append(file)
        header = read_header(file.bytes, file.size, str(path))
        for name, tensor in header.tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in another shard too")
            self.tensors[name], self._file_of[name] = tensor, file
        return header

    def read(self, name: str) -> PackedWeight:
        """The tensor as a view of the mapped file. Raises CheckpointError if there is none or the file shrank."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        info = self.tensors[name]
        fmt = get_format(info.format)
        data = self._file_of[name].view(info.offset, info.nbytes, name).reshape(fmt.parts(info.shape)[0].shape)
        return PackedWeight(fmt, info.shape, {"data": data})

    def release(self, name: str) -> None:
        info = self.tensors[name]
        self._file_of[name].release(info.offset, info.nbytes)

    def close(self) -> None:
        for file in self._files:
            file.close()


def shard_paths(path: Path) -> list[Path]:
    """All shards of a GGUF file named like `x-00001-of-00003.gguf`; any other file is its own only one.

    Raises CheckpointError if one is missing.
    """
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    total = int(match[3])
    if not 1 <= int(match[2]) <= total:
        raise CheckpointError(f"{path}: shard {match[2]} of {match[3]}")
    shards = [path.with_name(f"{match[1]}-{index:05d}-of-{match[3]}.gguf") for index in range(1, total + 1)]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise CheckpointError(f"{path}: missing shards {', '.join(missing[:4])}", "download them next to it")
    return shards
