"""Files and folders of the user, used where they are."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from chandra.errors import ModelNotFound, StoreError
from chandra.store.manifests import StoredModel
from chandra.store.names import Name


def open_path(name: Name) -> StoredModel:
    """The model at a path. Raises ModelNotFound or StoreError."""
    path = Path(name.path)
    try:
        status = path.stat()
        size = (
            sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else status.st_size
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFound(
            f"{path} does not exist", "check the path; a model of the catalog is named name:tag"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    return StoredModel(
        name=str(path),
        path=path,
        size=size,
        source="file",
        origin=str(path),
        modified=datetime.fromtimestamp(status.st_mtime, UTC),
    )
