"""What an architecture file states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from chandra.models.facts import Facts
from chandra.models.spec import ModelSpec


@dataclass(frozen=True)
class Name:
    """Where a file keeps a tensor. `base` is its name without `.weight` or `.bias`; {i} is the layer, {e} the expert.

    `part`: only these rows of it, "q", "k", "v", "gate" or "up". `grouped`: q, k and v stand together per key/value
    head. `bare`: the name has no suffix.
    """

    base: str
    part: str = ""
    grouped: bool = False
    bare: bool = False


NameTable = Mapping[str, tuple[Name, ...]]


@dataclass(frozen=True)
class Arch:
    """An architecture: how its facts become a `ModelSpec`, and what is special about its files.

    `model_types` are those of `config.json`, `gguf` is the `general.architecture`. `names`, for each kind of
    checkpoint, are the tensor names that differ from the usual. `unit_offset`: norm weights are stored less one
    (GGUF files hold the sum).
    """

    name: str
    build: Callable[[Facts], ModelSpec]
    model_types: tuple[str, ...]
    gguf: str | None = None
    experts: bool = False
    unit_offset: bool = False
    names: Mapping[str, NameTable] = field(default_factory=dict)
