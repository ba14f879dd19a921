"""Readers of models on disk: lazy, memory-mapped, and safe on hostile files."""

from __future__ import annotations

from pathlib import Path

from chandra.checkpoint.base import Checkpoint, TensorInfo
from chandra.checkpoint.gguf import GGUFCheckpoint
from chandra.errors import CheckpointError, ModelNotFound

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model file or folder, whatever it is.

    Raises ModelNotFound if there is none, CheckpointError if it is damaged, UnsupportedError if it is of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist", "check the path")
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files", "name one of them")
        path = files[0]
    return GGUFCheckpoint(path)
