"""Where models come from. Each source turns a name into a `StoredModel` and the blobs it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chandra.store.manifests import StoredModel
from chandra.store.parts import Progress


@dataclass(frozen=True)
class Job:
    """A pull: the canonical name of the model, the store's home, and the seconds a transfer may stand still."""

    name: str
    home: Path
    timeout: float
    progress: Progress

    def blob(self, sha256: str) -> Path:
        """Where the store keeps the file of a digest."""
        return self.home / "blobs" / f"sha256-{sha256}"

    def lock(self, sha256: str) -> Path:
        """What whoever writes or removes that file must hold."""
        return self.home / "locks" / f"sha256-{sha256}.lock"


@dataclass(frozen=True)
class Delivery:
    """What a source has for a name: the model as it will be stored, and for every missing blob how to fetch it."""

    model: StoredModel
    blobs: Mapping[Path, Callable[[], None]] = field(default_factory=dict)
