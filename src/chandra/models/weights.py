"""The tensors of a model: where each of them belongs, what is loaded, and what is reserved for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter

import numpy as np

from chandra.checkpoint.base import Checkpoint
from chandra.errors import UnsupportedError
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.memory.plan import Placement
from chandra.models.build import LayerBuilder
from chandra.models.spec import ModelSpec
from chandra.models.tensors import Source, part_of
from chandra.models.transforms import concatenate, convert, floats, loading_bytes, take_rows
from chandra.ops.contracts import Backend, Weight
from chandra.quant import Format, PackedWeight, get_format

HOST, EMBEDDING, HEAD = "cpu", "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Backends:
    """Which backend holds what: the embedding, each layer, and the final norm with the head."""

    embedding: Backend
    layers: tuple[Backend, ...]
    head: Backend
    experts: Mapping[int, Backend] = field(default_factory=dict)  # of layers whose experts lie apart
    placements: Mapping[str, Placement] = field(default_factory=dict)  # by `part_of`: of what is streamed, on disk

    def distinct(self) -> list[Backend]:
        """Every backend once, in the order the hidden state visits them."""
        layers = [(layer, self.experts.get(index, layer)) for index, layer in enumerate(self.layers)]
        return list({id(b): b for b in (self.embedding, *chain.from_iterable(layers), self.head)}.values())


class Weights:
    """Reads tensors and puts them where they belong. `builder` has those that are loaded."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        backends: Backends,
        ledger: Ledger,
        context_length: int,
        forms: Mapping[Source, Format],
    ) -> None:
        self.checkpoint, self.spec, self.backends, self.ledger, self.forms = checkpoint, spec, backends, ledger, forms
        self.builder = LayerBuilder(spec, backends.layers, context_length, self.reserve)
        self.reservations: dict[tuple[str, Kind], Reservation] = {}

    def release(self) -> None:
        self.builder.loaded.clear()
        for reservation in self.reservations.values():
            reservation.release()

    def backend(self, source: Source) -> Backend:
        layer, part = source.tensor.layer, part_of(source.tensor, self.spec)
        if layer is None:
            return self.backends.embedding if part == "embedding" else self.backends.head
        apart = self.backends.experts.get(layer) if part.endswith(".experts") else None
        return apart or self.backends.layers[layer]

    def placement(self, source: Source) -> Placement:
        part = part_of(source.tensor, self.spec)
        if source.tensor.layer not in self.backends.experts:
            part = part.removesuffix(".experts")
        return self.backends.placements.get(part, "resident")

    def copied(self, source: Source) -> bool:
        """Whether it is the embedding and, on another device, the head as well."""
        apart = self.backends.head is not self.backends.embedding
        return source.tensor.name == EMBEDDING and self.spec.tied_embeddings and apart

    def as_stored(self, source: Source) -> bool:
        """Whether it can be used where it lies in the file."""
        return self.forms[source].name == self.checkpoint.tensors[source.names[0]].format and not source.joined

    def stays(self, source: Source) -> bool:
        """Whether it is not loaded, but used in the file or read from there again and again."""
        return source.tensor.packable and self.placement(source) == "disk"

    def passing_bytes(self, source: Source) -> int:
        """Host bytes that a tensor takes while it is loaded, besides those it will have in its place. What stays in the
        file takes none: the CPU leaves it there until it is used."""
        on_cpu = self.backend(source).device.kind == "cpu" and self.placement(source) != "stream"
        in_file = source.tensor.packable and on_cpu and self.as_stored(source) and not self.copied(source)
        stored = get_format(self.checkpoint.tensors[source.names[0]].format)
        nbytes = loading_bytes(stored, self.forms[source], source.tensor.shape, source.joined)
        return 0 if in_file or self.stays(source) else nbytes

    def reserve(self, device: str, kind: Kind, nbytes: int, over: bool = False) -> None:
        """More bytes, or fewer; where they make up for others, also `over` the cap."""
        key = device, kind
        if key not in self.reservations:
            self.reservations[key] = self.ledger.reserve(*key, 0)
        self.reservations[key].resize(self.reservations[key].nbytes + nbytes, over)

    def exchange(self, changes: Mapping[tuple[str, Kind], int], over: bool = False) -> None:
        """Reserve some bytes for others. Raises BudgetExceeded, and changes nothing, if a device that then has more
        reserved than before has no room for that, unless it may go `over` its cap."""
        for device in {device for device, _ in changes}:
            more = sum(nbytes for (name, _), nbytes in changes.items() if name == device)
            if more > 0 and not over:
                self.ledger.reserve(device, Kind.LOADING, more).release()
        for (device, kind), nbytes in sorted(changes.items(), key=itemgetter(1)):  # what is given back comes first
            self.reserve(device, kind, nbytes, over=True)

    def load(self, source: Source) -> None:
        """Put a tensor where it belongs. Raises BudgetExceeded."""
        name, form = source.tensor.name, self.forms[source]
        nbytes, targets = form.nbytes(source.tensor.shape), {name: self.backend(source)}
        if self.copied(source):
            targets[HEAD] = self.backends.head
        separate_head = not self.spec.tied_embeddings or HEAD in targets
        weight = self.read(source)
        for key, backend in targets.items():
            lookup = key == EMBEDDING and separate_head
            mapped = lookup and self.as_stored(source) and backend.device.kind == "cpu"
            kind = Kind.PAGE_CACHE if mapped else Kind.WEIGHTS
            self.reserve(backend.device.name, kind, nbytes)
            if source.tensor.packable or source.tensor.role == "router":
                self.builder.loaded[key] = backend.load_weight(weight, lookup)
                self.reserve(backend.device.name, kind, self.builder.loaded[key].nbytes - nbytes)
            else:
                self.builder.loaded[key] = backend.upload(weight.parts["data"].view(np.float32))

    def read(self, source: Source) -> PackedWeight:
        """The tensor in host memory, in its format."""
        form = self.forms[source]
        if not source.tensor.packable:
            values = floats(self.checkpoint.read(source.names[0]), source.tensor.name) + np.float32(source.offset)
            if source.rows:
                values = np.concatenate([values[start:stop] for start, stop in source.rows])
            return PackedWeight(form, source.tensor.shape, {"data": values.view(np.uint8)})
        stored = [take_rows(self.checkpoint.read(name), source.rows) for name in source.names]
        weight = stored[0] if len(stored) == 1 else concatenate(stored, source.tensor.shape)
        return weight if form.name == weight.format.name else convert(weight, form)

    def drop(self, source: Source) -> None:
        """Drop the pages of the file that a tensor was read from."""
        for stored in source.names:
            self.checkpoint.release(stored)

    def in_file(self, source: Source, rows: tuple[int, int] | None = None) -> Weight:
        """A weight, or some rows of it, that is used where it lies in the file. Raises UnsupportedError."""
        if self.as_stored(source):
            weight = take_rows(self.read(source), (rows,) if rows else ())
            used = self.backend(source).load_weight(weight, lookup=True)
            if used.nbytes == weight.nbytes:
                return used
        raise UnsupportedError(
            f"{source.tensor.name} cannot be used in the file: it lies in pieces, or is converted or unpacked",
            "leave out --disk, or use a GGUF file in the format you want",
        )
