"""GGUF, versions 2 and 3: the header parsed with every count, length and offset checked before it is used.

Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from chandra.checkpoint.base import TensorInfo
from chandra.checkpoint.mapped import (
    MAX_ENTRIES,
    Header,
    MappedCheckpoint,
    MappedFile,
    NeedMoreBytes,
    check_no_overlap,
    damaged,
)
from chandra.errors import CheckpointError, UnsupportedError
from chandra.quant import format_of_ggml_type

MAGIC = b"GGUF"
MAX_STRING = 16 << 20  # bytes
MAX_TEXT = (1 << 32) - 1  # bytes of an array of strings
MAX_NAME = 65_535  # bytes of a key or a tensor's name
MAX_ITEMS = 64 << 20  # of an array
MAX_DIMS = 4
MAX_SHARDS = 99_999  # five digits

_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

# Types without a format in `quant`, with values and bytes of a block: enough to check and list such tensors.
_UNSUPPORTED: dict[int, tuple[str, int, int]] = {
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54)},
    **{35: ("TQ2_0", 256, 66), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
}


class StringArray(Collection[str]):
    """The strings of an array, read when they are asked for: a list of 262,144 tokens would take 20 MB.

    `data` has each after its length in 8 bytes. Bytes that are not UTF-8 are carried as surrogate escapes (PEP 383).
    """

    def __init__(self, data: memoryview, count: int) -> None:
        self.data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, string: object) -> bool:
        return any(string == each for each in self)

    def __iter__(self) -> Iterator[str]:
        at = 0
        while at < len(self.data):
            start = at + 8
            at = start + int.from_bytes(self.data[at:start], "little")
            yield str(self.data[start:at], "utf-8", "surrogateescape")


class _Cursor:
    """A place in the header that never moves past the bytes that are there."""

    def __init__(self, data: memoryview, size: int, file: str) -> None:
        self.data, self.size, self.file, self.at = data, size, file, 0

    def take(self, nbytes: int, what: str) -> int:
        """Step over these bytes; returns where they start."""
        start, end = self.at, self.at + nbytes
        if end > self.size:
            where = f"{what} at byte {start} takes {nbytes} bytes and the file ends at {self.size}"
            raise damaged(self.file, f"truncated, or a wrong length: {where}")
        if end > len(self.data):
            raise NeedMoreBytes(end)
        self.at = end
        return start

    def number(self, code: str, what: str) -> Any:
        start = self.take(struct.calcsize("<" + code), what)
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self, what: str, limit: int = MAX_STRING, errors: str = "surrogateescape") -> str:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            raise damaged(self.file, f"{what} at byte {self.at} has {length} bytes; {limit} are allowed")
        start = self.take(length, what)
        try:
            return str(self.data[start : self.at], "utf-8", errors)
        except UnicodeDecodeError as error:
            raise damaged(self.file, f"{what} at byte {start} is not UTF-8: {error}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise damaged(self.file, f"{what} has the unknown value type {kind}")
        number = self.number(_SCALARS[kind], what)
        if kind == _BOOL and number > 1:
            raise damaged(self.file, f"{what} is a boolean of value {number}")
        return bool(number) if kind == _BOOL else number

    def array(self, what: str) -> Any:
        """A StringArray, or a numpy array (of numbers: a view of the data; of bool)."""
        kind, count = self.number("I", f"the type of {what}"), self.number("Q", f"the length of {what}")
        if count > MAX_ITEMS:
            raise damaged(self.file, f"{what} has {count} items; {MAX_ITEMS} are allowed")
        if kind == _STRING:
            return self.strings(count, what)
        if kind not in _SCALARS:
            raise damaged(self.file, f"{what} has items of the unknown or nested type {kind}")
        dtype = np.dtype("<" + _SCALARS[kind])
        items = np.frombuffer(self.data, dtype, count, self.take(count * dtype.itemsize, what))
        return items != 0 if kind == _BOOL else items

    def strings(self, count: int, what: str) -> StringArray:
        start = at = self.at
        self.take(8 * count, what)  # the lengths alone
        data, unpack, whole = self.data, struct.Struct("<Q").unpack_from, False
        with suppress(struct.error, OverflowError):  # of the last string, if the data ends within its length
            for _ in range(count):  # many: the checks come after
                at += 8 + unpack(data, at)[0]
            whole = True
        self.at = start
        if not whole or at > len(data) or at - start > MAX_STRING:
            for _ in range(count):
                self.string(f"a string of {what}")  # one of them raises, or all are right
        if at - start > MAX_TEXT:
            raise damaged(self.file, f"{what} has {at - start} bytes; {MAX_TEXT} are allowed")
        self.at = at
        return StringArray(data[start:at], count)


def read_header(data: bytes | memoryview, size: int, file: str = "GGUF header") -> Header:
    """Parse a header from the first bytes of a file of `size` bytes; `file` is its name for messages.

    Raises NeedMoreBytes if `data` ends before the header does, CheckpointError for a damaged header, UnsupportedError
    for other versions, big-endian files and tensor types of unknown size.
    """
    cursor = _Cursor(memoryview(data), size, file)
    _check_version(cursor)
    num_tensors, num_keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    for count, least, what in ((num_tensors, 32, "tensors"), (num_keys, 13, "metadata keys")):
        if count > MAX_ENTRIES or count * least > size - cursor.at:
            raise damaged(file, f"{count} {what} are declared; {MAX_ENTRIES} are allowed, in a file of {size} bytes")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a metadata key", MAX_NAME, "strict")
        kind = cursor.number("I", f"the type of {key!r}")
        value = cursor.value(kind, repr(key))
        if key in metadata:
            raise damaged(file, f"duplicate metadata key {key!r}")
        if key == "general.alignment" and (kind != _UINT32 or value == 0 or value & (value - 1)):
            raise damaged(file, f"general.alignment must be a power of two in a uint32, not type {kind}: {value!r}")
        metadata[key] = value
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for _ in range(num_tensors):
        info = _tensor(cursor)
        if info.name in tensors:
            raise damaged(file, f"duplicate tensor {info.name!r}")
        tensors[info.name], offsets[info.name] = info, cursor.number("Q", f"the offset of {info.name!r}")
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    for name, offset in offsets.items():
        begin, end = start + offset, start + offset + tensors[name].nbytes
        if offset % alignment:
            raise damaged(file, f"tensor {name!r} at offset {offset} is not aligned to {alignment} bytes")
        if end > size:
            raise damaged(file, f"truncated: tensor {name!r} is at bytes {begin} to {end}, the file ends at {size}")
        offsets[name] = begin
    check_no_overlap(file, tensors, offsets)
    return Header(metadata, tensors, offsets, start)


def _check_version(cursor: _Cursor) -> None:
    cursor.take(4, "the magic")
    if (magic := bytes(cursor.data[:4])) != MAGIC:
        raise damaged(cursor.file, f"not a GGUF file: it starts with {magic!r}")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"is big-endian (version {swapped})" if 0 < swapped < 256 else f"has version {version}"
        hint = "Chandra reads little-endian GGUF 2 and 3: convert the model again"
        raise UnsupportedError(f"{cursor.file}: the GGUF file {what}", hint)


def _tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.string("a tensor's name", MAX_NAME, "strict")
    what = f"tensor {name!r}"
    num_dims = cursor.number("I", f"the rank of {what}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise damaged(cursor.file, f"{what} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
    shape = tuple(cursor.number("Q", f"the shape of {what}") for _ in range(num_dims))[::-1]  # stored columns first
    kind = cursor.number("I", f"the type of {what}")
    try:
        format_name, block_size, block_bytes = _UNSUPPORTED.get(kind) or _block(kind)
    except UnsupportedError as error:
        raise UnsupportedError(f"{cursor.file}: {what}: {error.message}", error.hint) from None
    if 0 in shape or shape[-1] % block_size:
        raise damaged(cursor.file, f"{what} of {format_name} has a shape of zeros or broken blocks: {shape}")
    return TensorInfo(name, shape, format_name, math.prod(shape) // block_size * block_bytes)


def _block(kind: int) -> tuple[str, int, int]:
    found = format_of_ggml_type(kind)
    return found.name, found.block_size, found.block_bytes


def shard_group(path: Path) -> str:
    """What the names of a model's shards have in common; the whole name of a file that is no shard."""
    match = _SHARD.fullmatch(path.name)
    return f"{match[1]}-of-{match[3]}" if match else path.name


def open_gguf(path: Path) -> MappedCheckpoint:
    """Open a GGUF file, or all shards of the model that this one belongs to; metadata is that of the first shard.

    Raises what `read_header` raises, ModelNotFound for a missing shard, CheckpointError for mixed-up ones.
    """
    parts = [_open(path)]
    count = parts[0][1].metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= MAX_SHARDS:
        raise damaged(path, f"split.count is {count!r}")
    if count > 1:
        parts = [_open(shard) for shard in _shards(path, count)]
        for number, (file, header) in enumerate(parts):
            own = header.metadata.get("split.no"), header.metadata.get("split.count")
            if own != (number, count):
                raise damaged(file.path, f"its split.no and split.count are {own}, not {(number, count)}")
    return MappedCheckpoint("gguf", parts[0][0].path, parts[0][1].metadata, parts)


def _open(path: Path) -> tuple[MappedFile, Header]:
    file = MappedFile(path)
    return file, read_header(file.view(), file.size, str(path))


def _shards(path: Path, count: int) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        hint = f"name the shards model-00001-of-{count:05}.gguf and so on, in one folder"
        raise CheckpointError(f"{path} is one of {count} shards, and its name does not say which", hint)
    return [path.with_name(f"{match[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
