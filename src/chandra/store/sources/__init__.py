"""Where models come from. Each source turns a name into a `StoredModel` and the blobs it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chandra.store.manifests import StoredModel


@dataclass(frozen=True)
class Delivery:
    """What a source has for a name: the model as it will be stored, and for every missing blob how to fetch it."""

    model: StoredModel
    blobs: Mapping[Path, Callable[[], None]] = field(default_factory=dict)
