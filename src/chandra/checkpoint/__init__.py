"""Model files: lazy readers that check everything before they use it."""

from __future__ import annotations

from pathlib import Path

from chandra.checkpoint.base import Checkpoint, TensorInfo
from chandra.checkpoint.gguf import MAGIC, StringArray, open_gguf, shard_group
from chandra.checkpoint.mapped import Header, MappedCheckpoint, MappedFile, NeedMoreBytes, list_folder
from chandra.checkpoint.safetensors import open_safetensors
from chandra.errors import CheckpointError, UnsupportedError

__all__ = [
    "Checkpoint",
    "Header",
    "MappedCheckpoint",
    "MappedFile",
    "NeedMoreBytes",
    "StringArray",
    "TensorInfo",
    "open_checkpoint",
    "open_gguf",
    "open_safetensors",
]

_LITGPT = "lit_model.pth"
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_KNOWN = "Chandra reads GGUF files, Hugging Face folders with safetensors, and Lit-GPT folders"


def open_checkpoint(path: str | Path) -> MappedCheckpoint:
    """Open a model file or folder, whatever it is: header read and checked, weights mapped lazily.

    Raises ModelNotFound if there is nothing at `path`, CheckpointError for what is damaged, truncated, hostile or
    ambiguous, UnsupportedError for what Chandra cannot read, pickles among it.
    """
    path = Path(path)
    names = list_folder(path)
    return _open_file(path) if names is None else _open_folder(path, names)


def _open_file(path: Path) -> MappedCheckpoint:
    start = bytes(MappedFile(path).view()[:40])
    if start.startswith(MAGIC):
        return open_gguf(path)
    if start.startswith((b"PK", b"\x80")):
        if path.name == _LITGPT:
            return _open_litgpt(path.parent)
        raise _pickle(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return open_safetensors(path)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the model", "fetch the file itself: git lfs pull")
    raise CheckpointError(f"{path} is not a model file: it starts with {start[:8]!r}", _KNOWN)


def _open_folder(folder: Path, names: list[str]) -> MappedCheckpoint:
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return open_safetensors(folder)
    models = [name for name in names if name.endswith(".gguf")]
    if len({shard_group(folder / name) for name in models}) > 1:
        raise CheckpointError(f"{folder} has several models: {', '.join(models[:8])}", "give the path of one of them")
    if models:
        return _open_file(folder / models[0])
    if _LITGPT in names:
        return _open_litgpt(folder)
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles:
        raise _pickle(folder / pickles[0])
    raise CheckpointError(f"{folder} has no model" + ("" if names else ": it is empty"), _KNOWN)


def _open_litgpt(folder: Path) -> MappedCheckpoint:
    from chandra.checkpoint.litgpt import open_litgpt  # here: yaml and zipfile take time to import

    return open_litgpt(folder)


def _pickle(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} is a pickle, which can run code when it is loaded; Chandra does not read it",
        "convert it to safetensors, or take a model that comes as safetensors or GGUF",
    )
