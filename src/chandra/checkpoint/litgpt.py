"""Lit-GPT folders: `lit_model.pth` and `model_config.yaml`.

torch reads the pickle with `weights_only` on the meta device: that yields names, shapes and the place of each storage
in the file, and runs no code. The weights are then mapped like those of any other file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import yaml

from chandra.checkpoint.base import TensorInfo
from chandra.checkpoint.mapped import MAX_ENTRIES, Header, MappedCheckpoint, MappedFile, damaged, read_bounded
from chandra.errors import CheckpointError, UnsupportedError
from chandra.lazy import torch

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"
MAX_CONFIG = 64 << 10  # bytes


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: with them a small file can stand for an endless one."""

    def fetch_alias(self) -> None:
        raise yaml.YAMLError("aliases are not allowed")


def open_litgpt(folder: Path) -> MappedCheckpoint:
    """Open a Lit-GPT folder; tensor names are the file's own, metadata is `model_config.yaml`.

    Raises CheckpointError for a damaged file and for a pickle that holds anything but tensors, UnsupportedError for
    tensors that are not contiguous, ModelNotFound for a missing file.
    """
    try:
        metadata = yaml.load(read_bounded(folder / CONFIG, MAX_CONFIG), _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise damaged(folder / CONFIG, f"its YAML cannot be read: {error}") from None
    if not isinstance(metadata, dict):
        raise damaged(folder / CONFIG, f"a mapping was expected, not a {type(metadata).__name__}")
    file = MappedFile(folder / WEIGHTS)
    records = _records(file)
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    for name, tensor in _state_dict(file.path).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise damaged(file.path, f"entry {name!r} is a {type(tensor).__name__}, not a tensor")
        tensors[name], offsets[name] = _tensor(file.path, name, tensor, records)
    return MappedCheckpoint("litgpt", folder, metadata, [(file, Header({}, tensors, offsets, 0))])


def _records(file: MappedFile) -> dict[int, int]:
    """Bytes of each record of the archive, by where its data starts."""
    records: dict[int, int] = {}
    try:
        with zipfile.ZipFile(file.path) as archive:
            for record in archive.infolist():
                stem = record.filename.partition("/")[2]
                if record.compress_type != zipfile.ZIP_STORED or record.file_size > file.size:
                    raise damaged(file.path, f"record {record.filename!r} is compressed or larger than the file")
                if stem == "byteorder" and archive.read(record) != b"little":
                    raise UnsupportedError(f"{file.path} is big-endian", "save it on a little-endian machine")
                head = bytes(file.array(record.header_offset, 30))
                skipped = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
                records[record.header_offset + 30 + skipped] = record.file_size
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, RuntimeError) as error:
        raise damaged(file.path, f"not an archive as torch.save writes it: {error}") from None
    return records


def _state_dict(path: Path) -> dict[Any, Any]:
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        hint = "such a file can run code when it is loaded; convert it to safetensors where you trust it"
        raise CheckpointError(f"{path} holds more than tensors", hint) from None
    except Exception as error:  # torch raises nothing narrower
        raise damaged(path, f"torch cannot read it: {error}") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or len(state) > MAX_ENTRIES:
        raise damaged(path, f"a dictionary of at most {MAX_ENTRIES} tensors was expected")
    return state


def _tensor(path: Path, name: str, tensor: Any, records: dict[int, int]) -> tuple[TensorInfo, int]:
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise UnsupportedError(f"{path}: tensor {name!r} is not contiguous", "save it again with .contiguous()")
    formats = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    nbytes = tensor.numel() * tensor.element_size()
    start, skipped = tensor.untyped_storage()._checkpoint_offset, tensor.storage_offset() * tensor.element_size()
    if skipped + nbytes > records.get(start, -1):
        what = f"tensor {name!r} takes {skipped + nbytes} bytes of the record at byte {start}"
        raise damaged(path, f"{what}, which has {records.get(start, 0)}")
    info = TensorInfo(name, tuple(tensor.shape), formats.get(tensor.dtype, str(tensor.dtype)), nbytes)
    return info, start + skipped
