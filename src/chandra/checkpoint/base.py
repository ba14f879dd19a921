"""What every checkpoint reader offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from chandra.quant.base import PackedWeight


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file describes it: logical shape (rows first), format name of `quant`, bytes in the file."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int


class Checkpoint(Protocol):
    """A model on disk: header read and checked, weights mapped lazily.

    `kind` is "gguf", "hf" or "litgpt"; `metadata` is the GGUF key/value table or `config.json` (for Lit-GPT:
    `model_config.yaml`); tensor names are the file's own.
    """

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> PackedWeight:
        """The tensor as a view of the mapped file (copy-on-write, so that it may be handed to torch)."""
        ...

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Read the pages of these bytes of a tensor into memory before they are used; other threads run meanwhile."""
        ...

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Tell the system that the pages of these bytes of a tensor are not needed any more."""
        ...

    def close(self) -> None: ...
