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
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
        size, modified = sum(file.stat().st_size for file in files), path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelNotFound(f"{path} does not exist", "check the path, or name a model as name:tag") from error
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    return StoredModel(str(path), path, size, "file", modified=datetime.fromtimestamp(modified, UTC))
