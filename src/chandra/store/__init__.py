"""Models on this machine: names, the catalog, downloads and the store."""

from chandra.store.catalog import Catalog, Entry, Package, load_catalog
from chandra.store.manifests import StoredModel
from chandra.store.names import Name, parse_digest, parse_name
from chandra.store.parts import Progress
from chandra.store.store import Removal, Store

__all__ = [
    "Catalog",
    "Entry",
    "Name",
    "Package",
    "Progress",
    "Removal",
    "Store",
    "StoredModel",
    "load_catalog",
    "parse_digest",
    "parse_name",
]
