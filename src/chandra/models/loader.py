"""From a checkpoint to a `Decoder`: tensor by tensor, every byte reserved before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from chandra.checkpoint.base import Checkpoint
from chandra.errors import UnsupportedError
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.memory.plan import Placement
from chandra.models.build import LayerBuilder
from chandra.models.decoder import FLOAT, Backends, Decoder
from chandra.models.layers import DecoderLayer
from chandra.models.spec import ModelSpec
from chandra.models.tensors import Source, find_sources, part_of
from chandra.models.transforms import concatenate, convert, floats, loading_bytes, take_rows
from chandra.models.weight_stream import (
    MappedHead,
    MappedStream,
    ReadStream,
    SlotStream,
    Stream,
    lookup_bytes,
    piece_rows,
)
from chandra.ops.contracts import Array, Backend, HostBytes, Linear, Weight
from chandra.quant import Format, PackedWeight, get_format

HOST, EMBEDDING, HEAD = "cpu", "model.embed_tokens.weight", "lm_head.weight"


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    backends: Backends,
    ledger: Ledger,
    *,
    context_length: int,
    max_rows: int,
    max_logit_rows: int,
    micro_rows: int = 0,
    formats: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load a model for contexts of up to `context_length` tokens and batches of up to `max_rows` tokens, which pass
    through several devices in parts of at least `micro_rows` (0: as a whole).

    `formats` names the format for those tensors of the table that are to be converted; `progress` is told the bytes
    done and in all. Raises CheckpointError for tensors that are missing, misshapen or not finite, BudgetExceeded if a
    device has no room; nothing stays reserved then.
    """
    sources = find_sources(spec, checkpoint)
    wanted = stored_formats(sources, checkpoint) | dict(formats or {})
    forms = {source: get_format(wanted[source.tensor.name]) for source in sources}
    loading = Loader(checkpoint, spec, backends, ledger, context_length, forms)
    total, done = sum(form.nbytes(source.tensor.shape) for source, form in forms.items()), 0
    try:
        for source in sorted(sources, key=loading.passing_bytes, reverse=True):  # the most first, while there is room
            with ledger.reserve(HOST, Kind.LOADING, loading.passing_bytes(source)):
                loading.load(source)
            done += forms[source].nbytes(source.tensor.shape)
            if progress:
                progress(done, total)
        return loading.decoder(max_rows, max_logit_rows, micro_rows)
    except BaseException:
        loading.release()
        raise


def stored_formats(sources: Iterable[Source], checkpoint: Checkpoint) -> dict[str, str]:
    """The format in which each tensor of the table is loaded, if it is not converted."""
    return {
        source.tensor.name: checkpoint.tensors[source.names[0]].format if source.tensor.packable else "F32"
        for source in sources
    }


class LayerImage:
    """The weights of a layer one after another, in the layout of its device."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.nbytes = backend, 0
        self.places: dict[str, tuple[Source, Format, slice]] = {}

    def add(self, source: Source, form: Format) -> None:
        start = self.nbytes
        self.nbytes += self.backend.weight_nbytes(form, source.tensor.shape)
        self.places[source.tensor.name] = source, form, slice(start, self.nbytes)

    def bind(self, memory: Array) -> dict[str, Weight]:
        """The weights over device memory that holds the image when they are used."""
        return {
            name: self.backend.bind_weight(form, source.tensor.shape, memory[place])
            for name, (source, form, place) in self.places.items()
        }


class Loader:
    """Brings tensors to their places, and layers from memory to the file and back while the model is in use."""

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
        self.builder = LayerBuilder(spec, backends.layers, context_length, self._reserve)
        self.reservations: dict[tuple[str, Kind], Reservation] = {}
        self.mapped = MappedStream[DecoderLayer](self._touch, self._drop)
        self._images: dict[int, LayerImage] = {}
        self._hosts: dict[int, HostBytes] = {}
        self._mapped: dict[int, list[Source]] = {}
        self._pages = 0
        self._rows: Source | None = None
        for source, form in forms.items():
            layer = source.tensor.layer
            if layer is not None and source.tensor.packable and self._placement(source) in ("stream", "disk"):
                backend = self._backend(source)
                if backend.device.kind == "cpu":
                    self._mapped.setdefault(layer, []).append(source)
                else:
                    self._images.setdefault(layer, LayerImage(backend)).add(source, form)

    def release(self) -> None:
        self.mapped.close()
        for held in (self.builder.loaded, self._images, self._hosts):
            held.clear()
        for reservation in self.reservations.values():
            reservation.release()

    def passing_bytes(self, source: Source) -> int:
        """Host bytes that a tensor takes while it is loaded, besides those it will have in its place. What stays in the
        file takes none: the CPU leaves it there until it is used."""
        on_cpu = self._backend(source).device.kind == "cpu" and self._placement(source) != "stream"
        in_file = source.tensor.packable and on_cpu and self._as_stored(source) and not self._copied(source)
        stored = get_format(self.checkpoint.tensors[source.names[0]].format)
        nbytes = loading_bytes(stored, self.forms[source], source.tensor.shape, source.joined)
        return 0 if in_file or self.stays(source) else nbytes

    def load(self, source: Source) -> None:
        tensor, placement = source.tensor, self._placement(source)
        if self.stays(source):
            return
        if tensor.packable and placement == "stream":
            self._pack(source)
        else:
            self._load(source)
        for stored in source.names:
            self.checkpoint.release(stored)

    def stays(self, source: Source) -> bool:
        """Whether it is not loaded, but used in the file or read from there again and again."""
        return source.tensor.packable and self._placement(source) == "disk"

    def _load(self, source: Source) -> None:
        name, form = source.tensor.name, self.forms[source]
        nbytes, targets = form.nbytes(source.tensor.shape), {name: self._backend(source)}
        if self._copied(source):
            targets[HEAD] = self.backends.head
        separate_head = not self.spec.tied_embeddings or HEAD in targets
        weight = self._read(source)
        for key, backend in targets.items():
            lookup = key == EMBEDDING and separate_head
            mapped = lookup and self._as_stored(source) and backend.device.kind == "cpu"
            kind = Kind.PAGE_CACHE if mapped else Kind.WEIGHTS
            self._reserve(backend.device.name, kind, nbytes)
            if source.tensor.packable or source.tensor.role == "router":
                self.builder.loaded[key] = backend.load_weight(weight, lookup)
                self._reserve(backend.device.name, kind, self.builder.loaded[key].nbytes - nbytes)
            else:
                self.builder.loaded[key] = backend.upload(weight.parts["data"].view(np.float32))

    def _pack(self, source: Source) -> None:
        """Into the image of its layer in host memory."""
        assert source.tensor.layer is not None
        image = self._images[source.tensor.layer]
        host = self._hosts.get(source.tensor.layer)
        if host is None:
            self._reserve(HOST, Kind.WEIGHTS, image.nbytes)
            host = self._hosts[source.tensor.layer] = image.backend.host_buffer(image.nbytes)
        image.backend.pack_weight(self._read(source), host[image.places[source.tensor.name][2]])

    def _copied(self, source: Source) -> bool:
        """Whether it is the embedding and, on another device, the head as well."""
        apart = self.backends.head is not self.backends.embedding
        return source.tensor.name == EMBEDDING and self.spec.tied_embeddings and apart

    def _backend(self, source: Source) -> Backend:
        layer, part = source.tensor.layer, part_of(source.tensor, self.spec)
        if layer is None:
            return self.backends.embedding if part == "embedding" else self.backends.head
        apart = self.backends.experts.get(layer) if part.endswith(".experts") else None
        return apart or self.backends.layers[layer]

    def _placement(self, source: Source) -> Placement:
        part = part_of(source.tensor, self.spec)
        if source.tensor.layer not in self.backends.experts:
            part = part.removesuffix(".experts")
        return self.backends.placements.get(part, "resident")

    def _as_stored(self, source: Source) -> bool:
        """Whether it can be used where it lies in the file."""
        return self.forms[source].name == self.checkpoint.tensors[source.names[0]].format and not source.joined

    def _reserve(self, device: str, kind: Kind, nbytes: int) -> None:
        key = device, kind
        if key not in self.reservations:
            self.reservations[key] = self.ledger.reserve(*key, 0)
        self.reservations[key].resize(self.reservations[key].nbytes + nbytes)

    def _read(self, source: Source) -> PackedWeight:
        form = self.forms[source]
        if not source.tensor.packable:
            values = floats(self.checkpoint.read(source.names[0]), source.tensor.name) + np.float32(source.offset)
            if source.rows:
                values = np.concatenate([values[start:stop] for start, stop in source.rows])
            return PackedWeight(form, source.tensor.shape, {"data": values.view(np.uint8)})
        stored = [take_rows(self.checkpoint.read(name), source.rows) for name in source.names]
        weight = stored[0] if len(stored) == 1 else concatenate(stored, source.tensor.shape)
        return weight if form.name == weight.format.name else convert(weight, form)

    def decoder(self, max_rows: int, max_logit_rows: int, micro_rows: int) -> Decoder:
        loaded = self.builder.loaded
        layers, streams = self._layers()
        self._map_rows(max_rows)
        head = self._map_head(max_logit_rows) or Linear(loaded.get(HEAD, loaded[EMBEDDING]))
        return Decoder(
            self.spec,
            self.backends,
            loaded[EMBEDDING],
            layers,
            self.builder.norm("model.norm"),
            head,
            self.ledger,
            max_rows,
            max_logit_rows,
            self,
            micro_rows,
            streams,
        )

    # layers that are not where they are computed

    def _layers(self) -> tuple[list[DecoderLayer], dict[str, Stream[DecoderLayer]]]:
        """All layers, and the streams that bring some of them, by part."""
        layers: dict[int, DecoderLayer] = {}
        streams: dict[str, Stream[DecoderLayer]] = {}
        for backend in {id(image.backend): image.backend for image in self._images.values()}.values():
            images = {i: image for i, image in self._images.items() if image.backend is backend}
            for make, held in ((self._slots, True), (self._reads, False)):
                if mine := {i: image for i, image in images.items() if (i in self._hosts) == held}:
                    stream, bound = make(backend, mine)
                    streams |= {f"layers.{i}": stream for i in bound}
                    layers |= bound
        for i in self._mapped:
            layers[i] = self._map(i)
            streams[f"layers.{i}.experts" if i in self.backends.experts else f"layers.{i}"] = self.mapped
        self._reserve_pages()
        every = range(self.spec.num_layers)
        return [layers[i] if i in layers else self.builder.layer(i) for i in every], streams

    def _slots(
        self, backend: Backend, images: dict[int, LayerImage]
    ) -> tuple[Stream[DecoderLayer], dict[int, DecoderLayer]]:
        largest = max(image.nbytes for image in images.values())
        self._reserve(backend.device.name, Kind.STAGING, 2 * largest)
        slots = [backend.empty((largest,), "uint8") for _ in range(2)]
        layers = {i: [self.builder.layer(i, image.bind(slot)) for slot in slots] for i, image in images.items()}
        stream = SlotStream(backend, {i: self._hosts[i] for i in images}, slots, layers)
        return stream, {i: bound[0] for i, bound in layers.items()}

    def _reads(
        self, backend: Backend, images: dict[int, LayerImage]
    ) -> tuple[Stream[DecoderLayer], dict[int, DecoderLayer]]:
        nbytes = {i: image.nbytes for i, image in images.items()}
        largest = max(nbytes.values())
        self._reserve(backend.device.name, Kind.STAGING, largest)
        self._reserve(HOST, Kind.STAGING, 2 * largest)
        buffers, slot = [backend.host_buffer(largest) for _ in range(2)], backend.empty((largest,), "uint8")
        layers = {i: self.builder.layer(i, image.bind(slot)) for i, image in images.items()}
        return ReadStream(backend, self._read_image, nbytes, buffers, slot, layers), layers

    def _read_image(self, index: int, out: HostBytes) -> None:
        image = self._images[index]
        for source, _, place in image.places.values():
            image.backend.pack_weight(self._read(source), out[place])
            for stored in source.names:
                self.checkpoint.release(stored)

    def _in_file(self, source: Source, rows: tuple[int, int] | None = None) -> Weight:
        """A weight, or some rows of it, that is used where it lies in the file. Raises UnsupportedError."""
        if self._as_stored(source):
            weight = take_rows(self._read(source), (rows,) if rows else ())
            used = self._backend(source).load_weight(weight, lookup=True)
            if used.nbytes == weight.nbytes:
                return used
        raise UnsupportedError(
            f"{source.tensor.name} cannot be used in the file: it lies in pieces, or is converted or unpacked",
            "leave out --disk, or use a GGUF file in the format you want",
        )

    def _map(self, index: int) -> DecoderLayer:
        """Let a layer be computed from the file."""
        bound = {source.tensor.name: self._in_file(source) for source in self._mapped[index]}
        layer = self.mapped.items[index] = self.builder.layer(index, bound)
        return layer

    def _map_rows(self, max_rows: int) -> None:
        """Look the rows of the embedding up in the file, if they stay there."""
        source = next(source for source in self.forms if source.tensor.name == EMBEDDING)
        if self.stays(source):
            self.builder.loaded[EMBEDDING] = weight = self._in_file(source)
            self._reserve(HOST, Kind.STAGING, lookup_bytes(max_rows, weight.nbytes))
            self._rows = source

    def drop_rows(self) -> None:
        """Drop what was looked up of an embedding that stays in the file."""
        if self._rows is not None:
            self.checkpoint.release(self._rows.names[0])

    def _map_head(self, max_logit_rows: int) -> MappedHead | None:
        """The head, if it is computed from the file."""
        if self.backends.placements.get("head") != "disk":
            return None
        wanted = EMBEDDING if self.spec.tied_embeddings else HEAD
        source = next(source for source in self.forms if source.tensor.name == wanted)
        name, rows = source.names[0], source.tensor.shape[0]
        step, nbytes = piece_rows(rows), self.checkpoint.tensors[source.names[0]].nbytes // rows
        self._reserve(HOST, Kind.STAGING, min(MappedStream.HELD * step, rows) * nbytes + FLOAT * max_logit_rows * step)

        def place(i: int) -> tuple[str, int, int]:
            return name, i * step * nbytes, min((i + 1) * step, rows) * nbytes

        checkpoint = self.checkpoint
        pieces = MappedStream[Linear](lambda i: checkpoint.prefetch(*place(i)), lambda i: checkpoint.release(*place(i)))
        for i, start in enumerate(range(0, rows, step)):
            pieces.items[i] = Linear(self._in_file(source, (start, min(start + step, rows))))
        return MappedHead(pieces, step, self.backends.head.empty((max_logit_rows * step,), "float32"))

    def _mapped_pages(self) -> int:
        """Bytes of as many mapped layers as are in memory at a time."""
        sizes = [sum(self.forms[s].nbytes(s.tensor.shape) for s in sources) for sources in self._mapped.values()]
        return min(self.mapped.HELD, len(sizes)) * max(sizes, default=0)

    def _reserve_pages(self) -> None:
        pages = self._mapped_pages()
        self._reserve(HOST, Kind.STAGING, pages - self._pages)
        self._pages = pages

    def _touch(self, index: int) -> None:
        for name in {name for s in self._mapped[index] if s.tensor.role != "experts" for name in s.names}:
            self.checkpoint.prefetch(name)

    def _drop(self, index: int) -> None:
        for name in {name for source in self._mapped[index] for name in source.names}:
            self.checkpoint.release(name)

    def demote(self, index: int) -> DecoderLayer:
        """Compute a layer that lies in host memory from the file from now on, and give its memory back. Raises
        UnsupportedError, and changes nothing, if that cannot be done with it."""
        sources = [s for s in self.forms if s.tensor.layer == index and s.tensor.packable]
        if any(s.tensor.name not in self.builder.loaded or self._backend(s).device.kind != "cpu" for s in sources):
            raise UnsupportedError(f"the weights of layer {index} are not in host memory")
        self._mapped[index] = sources
        try:
            layer = self._map(index)
        except BaseException:
            del self._mapped[index]
            raise
        nbytes = sum(self.builder.loaded.pop(source.tensor.name).nbytes for source in sources)
        self._reserve(HOST, Kind.STAGING, 0)
        weights, staging = self.reservations[HOST, Kind.WEIGHTS], self.reservations[HOST, Kind.STAGING]
        pages = self._mapped_pages() - self._pages
        weights.give(staging, pages)  # where the cap is exceeded nothing can be reserved
        self._reserve(HOST, Kind.WEIGHTS, pages - nbytes)
        self._pages += pages
        return layer

    def promote(self, index: int) -> DecoderLayer:
        """Load a layer that is computed from the file into host memory. Raises BudgetExceeded, and changes nothing, if
        there is no room."""
        sources = self._mapped[index]
        try:
            for source in sources:
                self._load(source)
        except BaseException:
            for source in sources:
                if (weight := self.builder.loaded.pop(source.tensor.name, None)) is not None:
                    self._reserve(HOST, Kind.WEIGHTS, -weight.nbytes)
            raise
        self.mapped.remove(index)
        del self._mapped[index]
        self._reserve_pages()
        return self.builder.layer(index)
