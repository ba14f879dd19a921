"""Manifests: small JSON files that say which blob or path a name stands for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any

from chandra.errors import StoreError
from chandra.store.parts import storing

VERSION = 1
MAX_MANIFEST = 4 << 20  # bytes


@dataclass(frozen=True)
class StoredModel:
    """A model that is on this machine.

    `path` is the file or folder to open; `digest` is `sha256-…` of a blob of the store, empty for a file that is used
    in place; `size` is in bytes. `origin` says where it came from. `template`, `system` and `params` override what the
    model file says; `adapters` are LoRA files to be applied; `messages` begin every conversation.
    """

    name: str
    path: Path
    size: int
    source: str
    origin: str = ""
    digest: str = ""
    license: str = ""
    note: str = ""
    template: str | None = None
    system: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[Path, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    modified: datetime | None = None  # when it was stored


class Manifests:
    """The folder `manifests/` of a store; blobs are found in `blobs`."""

    def __init__(self, root: Path, blobs: Path) -> None:
        self.root = root
        self.blobs = blobs

    def write(self, file: Path, model: StoredModel) -> None:
        """Writes it whole or not at all. `file` is relative to the root."""
        document = {
            "version": VERSION,
            **{key: getattr(model, key) for key in (*_TEXTS, "size", "template", "system")},
            "params": dict(model.params),
            "file": self._refer(model.path),
            "adapters": [self._refer(path) for path in model.adapters],
            "messages": [dict(message) for message in model.messages],
        }
        target = self.root / file
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        with storing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as stream:
                json.dump(document, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)

    def read(self, file: Path) -> StoredModel | None:
        """The model of a manifest; None if there is no such manifest. Raises StoreError for a damaged one."""
        target = self.root / file
        try:
            if target.stat().st_size > MAX_MANIFEST:
                raise ValueError("too large")
            document = json.loads(target.read_bytes())
            modified = datetime.fromtimestamp(target.stat().st_mtime, UTC)
            if not isinstance(document, dict) or not isinstance(document.get("version"), int):
                raise ValueError("not a manifest")
            if document["version"] > VERSION:
                raise StoreError(f"{target} was written by a newer Chandra", "upgrade Chandra")
            return self._model(document, modified)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {target}: {error.strerror}", "check its permissions") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"{target} is damaged: {error}", "remove that model and pull it again") from error

    def scan(self) -> Iterator[StoredModel | StoreError]:
        """All models in the order of their names; a damaged manifest gives its error."""
        for target in sorted(self.root.rglob("*.json")):
            try:
                model = self.read(target.relative_to(self.root))
                if model is not None:
                    yield model
            except StoreError as error:
                yield error

    def remove(self, file: Path) -> bool:
        """Whether there was one. Folders that become empty go, too."""
        target = self.root / file
        if not target.is_file():
            return False
        with storing(target):
            target.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            for folder in list(file.parents)[:-1]:
                (self.root / folder).rmdir()
        return True

    def _refer(self, path: Path) -> str:
        return path.name if path.parent == self.blobs else str(path)

    def _model(self, document: dict[str, Any], modified: datetime) -> StoredModel:
        texts = {key: _typed(document[key], str) for key in _TEXTS}
        return StoredModel(
            **texts,
            path=self.blobs / _typed(document["file"], str),  # an absolute path stays as it is
            size=_typed(document["size"], int),
            template=_typed(document["template"], str | None),
            system=_typed(document["system"], str | None),
            params=_typed(document["params"], dict),
            adapters=tuple(self.blobs / _typed(file, str) for file in _typed(document["adapters"], list)),
            messages=tuple(_message(item) for item in _typed(document.get("messages", []), list)),
            modified=modified,
        )


_TEXTS = ("name", "source", "origin", "digest", "license", "note")


def _typed(value: Any, kind: type | UnionType) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{str(value)[:40]!r} is not of the type {kind}")
    return value


def _message(item: Any) -> dict[str, str]:
    message = _typed(item, dict)
    return {key: _typed(message[key], str) for key in ("role", "content")}
