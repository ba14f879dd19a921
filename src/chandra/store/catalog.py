"""The catalog: well-known models, their shapes, and where they can be had."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from chandra.store.names import Name

_QUANT = re.compile(r"(?P<base>.+)-(?P<quant>(?:i?q[2-8]_\w+|f16|bf16|f32))", re.IGNORECASE)


@dataclass(frozen=True)
class Package:
    """A part of a model inside a wheel: package, version, member of the archive and its bytes."""

    name: str
    version: str
    member: str
    size: int


@dataclass(frozen=True)
class Entry:
    """A model of the catalog.

    `config` is the configuration in Hugging Face's form, so a plan needs no download. Either `packages` (joined in
    order, with `sha256` of the result) or `hub` (a repository with GGUF files) says where the weights are; `quant` is
    the file to take from the latter. `terms` are to be shown and accepted before a download.
    """

    name: str
    license: str
    config: Mapping[str, Any]
    packages: tuple[Package, ...] = ()
    sha256: str = ""
    hub: str = ""
    quant: str = "Q4_K_M"
    note: str = ""
    terms: str = ""

    @property
    def size(self) -> int | None:
        """Bytes to download, if known."""
        return sum(package.size for package in self.packages) or None


@dataclass(frozen=True)
class Catalog:
    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]

    def find(self, name: Name) -> Entry | None:
        """The entry of a name. Aliases such as `latest` are followed; a tag may end in a format: `llama2:7b-q8_0`."""
        if name.kind != "catalog":
            return None
        text = self.aliases.get(str(name), str(name))
        if text in self.entries:
            return self.entries[text]
        match = _QUANT.fullmatch(text)
        base = self.entries.get(match["base"]) if match else None
        if base is None or match is None or not base.hub:
            return None
        return Entry(**{**vars(base), "name": text, "quant": match["quant"].upper()})


@cache
def load_catalog() -> Catalog:
    """The catalog of this package."""
    document = json.loads(Path(__file__).with_name("catalog.json").read_text(encoding="utf-8"))
    entries = {}
    for name, fields in document["models"].items():
        fields = {"terms": "", **fields}
        packages = tuple(Package(**package) for package in fields.pop("packages", []))
        terms = document["terms"].get(fields.pop("terms"), "")
        entries[name] = Entry(name=name, packages=packages, terms=terms, **fields)
    return Catalog(entries, document["aliases"])
