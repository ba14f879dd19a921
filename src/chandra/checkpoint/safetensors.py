"""safetensors, one file or shards with an index, in a Hugging Face folder.

Source: the format as huggingface/safetensors describes it: a header's length in 8 bytes, the header in JSON, the data
without holes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, TypeGuard

from chandra.checkpoint.base import TensorInfo
from chandra.checkpoint.mapped import (
    MAX_ENTRIES,
    Header,
    MappedCheckpoint,
    MappedFile,
    NeedMoreBytes,
    check_no_overlap,
    damaged,
    list_folder,
    parse_json,
    read_bounded,
)
from chandra.errors import CheckpointError, UnsupportedError

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes
MAX_CONFIG = 16 << 20
MAX_DIMS = 8

_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
}
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")


def read_header(data: bytes | memoryview, size: int, file: str = "safetensors header") -> Header:
    """Parse a header from the first bytes of a file of `size` bytes; `file` is its name for messages.

    Raises NeedMoreBytes if `data` ends before the header does, CheckpointError for a damaged header, UnsupportedError
    for a dtype of unknown size.
    """
    if size >= 8 > len(data):
        raise NeedMoreBytes(8)
    length = int.from_bytes(data[:8], "little")
    start = 8 + length
    if not 2 <= length <= MAX_HEADER or start > size:
        what = f"its header is said to have {length} bytes; 2 to {MAX_HEADER} are allowed, in a file of {size}"
        raise damaged(file, f"truncated, or not a safetensors file: {what}")
    if len(data) < start:
        raise NeedMoreBytes(start)
    entries = parse_json(file, bytes(data[8:start]))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(file, "__metadata__ is not an object of strings")
    if len(entries) > MAX_ENTRIES:
        raise damaged(file, f"{len(entries)} tensors; {MAX_ENTRIES} are allowed")
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for name, entry in entries.items():
        tensors[name], begin = _tensor(file, name, entry, size - start)
        offsets[name] = start + begin
    check_no_overlap(file, tensors, offsets)
    total = sum(info.nbytes for info in tensors.values())
    if total != size - start:
        raise damaged(file, f"the tensors take {total} bytes and {size - start} follow the header")
    return Header(metadata, tensors, offsets, start)


def _tensor(file: str, name: str, entry: Any, room: int) -> tuple[TensorInfo, int]:
    what = f"tensor {name!r}"
    if not isinstance(entry, dict):
        raise damaged(file, f"{what} is described by a {type(entry).__name__}, not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape, MAX_DIMS) and _naturals(span, 2) and len(span) == 2):
        raise damaged(file, f"{what} has no proper dtype, shape (of up to {MAX_DIMS} dimensions) and data_offsets")
    if not span[0] <= span[1] <= room:
        raise damaged(file, f"{what} is at bytes {span[0]} to {span[1]} of the data, which has {room}")
    if dtype not in _BITS:
        raise UnsupportedError(f"{file}: {what} has the unknown dtype {dtype!r}", f"known are {', '.join(_BITS)}")
    nbytes = span[1] - span[0]
    if math.prod(shape) * _BITS[dtype] != 8 * nbytes:
        raise damaged(file, f"{what} of {dtype} {shape} has {nbytes} bytes, which disagree")
    return TensorInfo(name, tuple(shape), dtype, nbytes), span[0]


def _naturals(value: Any, limit: int) -> TypeGuard[list[int]]:
    """Whether this is a list of at most `limit` integers of up to 63 bits."""
    if not isinstance(value, list) or len(value) > limit:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def open_safetensors(path: Path, config: str = "config.json") -> MappedCheckpoint:
    """Open a Hugging Face folder, or one safetensors file of it; a shard stands for all shards of its model.

    Metadata is the folder's `config`. Raises what `read_header` raises, ModelNotFound for a missing configuration,
    index or shard, and CheckpointError for an index that disagrees with its shards or names files elsewhere.
    """
    names = list_folder(path)
    folder = path if names is not None else path.parent
    index: dict[str, str] = {}
    if _SHARD.fullmatch(path.name) or INDEX in (names or ()):
        index = _read_index(folder / INDEX)
        names = sorted(set(index.values()))
    else:
        names = [_single(folder, names) if names is not None else path.name]
    files = [MappedFile(folder / name) for name in names]
    parts = [(file, read_header(file.view(), file.size, str(file.path))) for file in files]
    present = dict(zip(names, (header.tensors for _, header in parts), strict=True))
    for tensor, name in index.items():
        if tensor not in present[name]:
            raise damaged(folder / INDEX, f"tensor {tensor!r} is not in {name}")
    return MappedCheckpoint("hf", folder, parse_json(folder / config, read_bounded(folder / config, MAX_CONFIG)), parts)


def _single(folder: Path, names: list[str]) -> str:
    names = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors" in names:
        return "model.safetensors"
    if len(names) != 1:
        what = f"{folder} has {len(names)} safetensors files and no {INDEX}: {', '.join(names[:5])}"
        raise CheckpointError(what, "fetch the index into the same folder, or give one of the files")
    return names[0]


def _read_index(path: Path) -> dict[str, str]:
    """File by tensor name; files of the index's folder only."""
    files = parse_json(path, read_bounded(path, MAX_HEADER)).get("weight_map")
    if not isinstance(files, dict) or not 1 <= len(files) <= MAX_ENTRIES:
        raise damaged(path, f"weight_map is not an object of 1 to {MAX_ENTRIES} tensors")
    for tensor, name in files.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or re.search(r"[/\\:\0]", name):
            raise damaged(path, f"weight_map puts {tensor!r} into {name!r}, which is not a file of this folder")
    return files
