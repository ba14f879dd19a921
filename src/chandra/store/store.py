"""The store: models on this machine, by name."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from chandra.errors import ModelNotFound, StoreError, UsageError
from chandra.lazy import filelock, hashlib
from chandra.store.catalog import Catalog, Entry, load_catalog
from chandra.store.manifests import Manifests, StoredModel
from chandra.store.names import Name, parse_name
from chandra.store.parts import Progress, locked, storing
from chandra.store.sources import Job
from chandra.store.sources.file import open_path

_holders = itertools.count()


@dataclass(frozen=True)
class Removal:
    """What a removal did: bytes of disk freed, and whether a running process still has the model open.

    A running process keeps what it mapped; the disk space is free once it ends.
    """

    freed: int
    loaded: bool


class Store:
    """Models below `home`: `blobs/sha256-…`, `manifests/<host>/<name>/<tag>.json`, `downloads/` and `locks/`.

    Several processes may use one store at once. `registry` is the host, or the URL, of names without one; `timeout` is
    how many seconds a transfer may stand still. Names are texts as in `parse_name`; a wrong one raises UsageError.
    """

    def __init__(self, home: Path, registry: str | None = None, timeout: float = 30.0) -> None:
        self.home = home
        self.registry = registry
        self.timeout = timeout
        self.blobs = home / "blobs"
        self.manifests = Manifests(home / "manifests", self.blobs)

    @property
    def catalog(self) -> Catalog:
        return load_catalog()

    def catalog_entry(self, name: str) -> Entry | None:
        """What the catalog says about a name; None if it is not in there."""
        return self.catalog.find(parse_name(name))

    def pull(self, name: str, progress: Progress | None = None, accept_license: bool = False) -> StoredModel:
        """Fetches a model, or what is new of it, and stores it under its name; a path is used in place.

        `progress` is called with a phase, the bytes done and the bytes in all (0: unknown). Raises ModelNotFound,
        DownloadError, DigestMismatch, DiskFull, StoreError, and UsageError if its terms were not accepted.
        """
        parsed, entry = self._name(name), self.catalog_entry(name)
        report = progress or _silent
        if parsed.kind == "file":
            return open_path(parsed)
        stored = self._read(parsed) if entry is not None else None
        if entry is not None and stored is not None and stored.digest == f"sha256-{entry.sha256}":
            return stored
        if entry is not None and entry.terms and not accept_license:
            raise UsageError(f"{entry.name} has terms of use:\n{entry.terms}", "accept them with --accept-license")
        report(f"pulling {parsed}", 0, (entry.size if entry else None) or 0)
        if entry is None and parsed.kind == "catalog" and self.registry is None:
            raise self._not_found(parsed)
        from chandra.store.pull import deliver  # httpx and huggingface_hub take half a second to import

        delivery = deliver(Job(str(parsed), self.home, self.timeout, report), parsed, entry, self.registry)
        with ExitStack() as locks:
            for blob in sorted(delivery.blobs):
                locks.enter_context(locked(self._lock(blob), report, f"pulling {parsed}"))
            for blob, fetch in delivery.blobs.items():
                if not blob.exists():
                    fetch()
            self.manifests.write(parsed.manifest, delivery.model)
        return self.resolve(name)

    def get(self, name: str, progress: Progress | None = None, accept_license: bool = False) -> StoredModel:
        """What `resolve` finds, or else what `pull` brings: no network for a model that is here."""
        return self.resolve(name) if self.has(name) else self.pull(name, progress, accept_license)

    def resolve(self, name: str) -> StoredModel:
        """The model of a name or a path. Raises ModelNotFound with the names that are close."""
        parsed = self._name(name)
        if parsed.kind == "file":
            return open_path(parsed)
        model = self._read(parsed)
        if model is not None:
            return model
        raise self._not_found(parsed)

    def has(self, name: str) -> bool:
        """Whether `resolve` finds it."""
        try:
            self.resolve(name)
        except ModelNotFound:
            return False
        return True

    def list(self) -> list[StoredModel]:
        """The models that can be opened; `problems` tells of the others."""
        return [model for model in self.manifests.scan() if isinstance(model, StoredModel) and model.path.exists()]

    def problems(self) -> Iterator[StoreError]:
        """What is wrong in the store: damaged manifests and models whose files are gone."""
        for model in self.manifests.scan():
            if isinstance(model, StoreError):
                yield model
            elif not model.path.exists():
                yield self._gone(model)

    def copy(self, source: str, destination: str) -> StoredModel:
        """Gives a model, or a file, a further name; no byte of it is copied."""
        return self.save(self.resolve(source), destination)

    def save(self, model: StoredModel, destination: str) -> StoredModel:
        """Stores a model under a name, with what it says besides the weights: system message, parameters, messages."""
        target = self._name(destination)
        if target.kind in ("file", "hub"):
            raise UsageError(f"{destination} cannot be a name of the store", "write a name such as mine:latest")
        blobs = [path for path in (model.path, *model.adapters) if path.parent == self.blobs]
        with ExitStack() as locks:
            for blob in sorted(set(blobs)):
                locks.enter_context(locked(self._lock(blob), _silent, f"copying {model.name}"))
            if not model.path.exists():
                raise self._gone(model)
            self.manifests.write(target.manifest, replace(model, name=str(target)))
        return self.resolve(destination)

    def remove(self, name: str) -> Removal:
        """Takes a name away, and every blob that no name needs any more. Raises ModelNotFound or StoreError."""
        parsed = self._name(name)
        if parsed.kind == "file":
            raise UsageError(f"{parsed} is a file of yours, not of the store", "remove it yourself")
        try:
            model = self.manifests.read(parsed.manifest)
        except StoreError:
            model = None
        if not self.manifests.remove(parsed.manifest):
            self.resolve(name)
        return Removal(self._sweep(), model is not None and self._is_held(model))

    @contextmanager
    def hold(self, model: StoredModel) -> Iterator[None]:
        """Marks a model of the store as loaded by this process, so that `remove` can tell."""
        if model.source == "file":
            yield
            return
        lock = filelock.FileLock(self._holds(model) / f"{os.getpid()}-{next(_holders)}.lock")
        with suppress(OSError):  # a store that cannot be written loses no model either
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
            with suppress(OSError):
                Path(lock.lock_file).unlink()

    def _name(self, text: str) -> Name:
        name = parse_name(text)
        entry = self.catalog.find(name)
        return parse_name(entry.name) if entry is not None else name

    def _read(self, name: Name) -> StoredModel | None:
        model = self.manifests.read(name.manifest)
        return model if model is not None and model.path.exists() else None

    def _not_found(self, name: Name) -> ModelNotFound:
        """The error for a name that is not here, with the names that are close."""
        import difflib  # here: nothing else needs it

        known = {model.name for model in self.list()} | set(self.catalog.entries)
        close = difflib.get_close_matches(str(name), sorted(known), n=3, cutoff=0.6)
        if str(name) in known or name.kind != "catalog":
            hint = f"pull it with `chandra pull {name}`"
        elif close:
            hint = f"did you mean {' or '.join(close)}?"
        else:
            hint = "`chandra list --all` shows what there is; hf.co/org/repo names a repository of the Hub"
        return ModelNotFound(f'model "{name}" not found', hint)

    def _lock(self, blob: Path) -> Path:
        return self.home / "locks" / f"{blob.name}.lock"

    def _holds(self, model: StoredModel) -> Path:
        key = model.digest or hashlib.sha256(str(model.path).encode()).hexdigest()
        return self.home / "locks" / "loaded" / key

    def _is_held(self, model: StoredModel) -> bool:
        for path in self._holds(model).glob("*.lock"):
            try:
                with filelock.FileLock(path, timeout=0):
                    path.unlink(missing_ok=True)  # left by a process that was killed
            except filelock.Timeout:
                return True
        return False

    def _sweep(self) -> int:
        """Removes the blobs no manifest names and returns their bytes; none while a manifest cannot be read."""
        freed = 0
        for blob in sorted(self.blobs.glob("sha256-" + "[0-9a-f]" * 64)):
            try:
                with storing(blob), filelock.FileLock(self._lock(blob), timeout=0):  # whoever writes it holds the lock
                    models = list(self.manifests.scan())
                    if any(isinstance(model, StoreError) or blob in (model.path, *model.adapters) for model in models):
                        continue
                    freed += blob.stat().st_size
                    blob.unlink()
            except filelock.Timeout:
                continue
        return freed

    def _gone(self, model: StoredModel) -> ModelNotFound:
        hint = f"`chandra pull {model.name}` or `chandra rm {model.name}`"
        return ModelNotFound(f"{model.name}: {model.path} is gone", hint)


def _silent(phase: str, done: int, total: int) -> None:
    pass
