"""Where the weights of layers are: where they are computed, in host memory, in the file. They can be moved while the
model is in use."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress

from chandra.errors import UnsupportedError
from chandra.memory.ledger import Kind
from chandra.memory.plan import Placement
from chandra.models.layers import DecoderLayer
from chandra.models.tensors import Source
from chandra.models.weight_stream import MappedStream, ReadStream, SlotStream, Stream
from chandra.models.weights import HOST, Weights
from chandra.ops.contracts import Array, Backend, HostBytes, Weight
from chandra.quant import Format

SLOTS = 2  # layers of a stream that are on a device at a time


class LayerImage:
    """The weights of a layer that go together: all of them, or its experts where those lie apart.

    `nbytes`: in the layout of their device, in which an image has them one after another; `stored`: in the file.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.nbytes, self.stored = backend, 0, 0
        self.places: dict[str, tuple[Source, Format, slice]] = {}

    @property
    def away(self) -> bool:
        return self.backend.device.kind != "cpu"

    @property
    def sources(self) -> list[Source]:
        return [source for source, _, _ in self.places.values()]

    def add(self, source: Source, form: Format) -> None:
        start = self.nbytes
        self.nbytes += self.backend.weight_nbytes(form, source.tensor.shape)
        self.stored += form.nbytes(source.tensor.shape)
        self.places[source.tensor.name] = source, form, slice(start, self.nbytes)

    def bind(self, memory: Array) -> dict[str, Weight]:
        """The weights over device memory that holds the image when they are used."""
        return {
            name: self.backend.bind_weight(form, source.tensor.shape, memory[place])
            for name, (source, form, place) in self.places.items()
        }


class Mover:
    """`layers` are those of the model; `streams`, by part, bring the weights of some; `places[i]` says where layer i's
    are: "resident", which is where they are computed, "stream" or "disk". `lookup`: the embedding, if it stays in the
    file."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.layers: list[DecoderLayer | None] = [None] * weights.spec.num_layers
        self.streams: dict[str, Stream[DecoderLayer]] = {}
        self.places: dict[int, Placement] = {}
        self.lookup: Source | None = None
        self._images: dict[int, LayerImage] = {}
        self._hosts: dict[int, HostBytes] = {}
        for source, form in weights.forms.items():
            index, backend = source.tensor.layer, weights.backend(source)
            if index is None or not source.tensor.packable or weights.backends.experts.get(index, backend) != backend:
                continue
            self._images.setdefault(index, LayerImage(backend)).add(source, form)
            placement = weights.placement(source)
            self.places[index] = placement if placement in ("stream", "disk") else "resident"

    def start(self) -> None:
        """Make the layers of what has been loaded. Raises BudgetExceeded."""
        for (device, kind), nbytes in self.needed(self.places).items():
            if kind is Kind.STAGING:
                self.weights.reserve(device, kind, nbytes)
        self._arrange(self.places, self.places)

    def release(self) -> None:
        self._let_go(self._images)
        for held in (self.layers, self._images, self._hosts):
            held.clear()
        self.weights.release()

    def drop_rows(self) -> None:
        """Drop what was looked up of an embedding that stays in the file."""
        if self.lookup is not None:
            self.weights.drop(self.lookup)

    def device(self, index: int) -> str:
        """Where a layer's weights are used."""
        return self._images[index].backend.device.name

    def can(self, index: int, placement: Placement) -> bool:
        """Whether a layer can be computed with its weights there."""
        image = self._images[index]
        if image.away or placement == "resident":
            return True
        with suppress(UnsupportedError):
            return placement == "disk" and all(map(self.weights.in_file, image.sources))
        return False

    def needed(self, places: Mapping[int, Placement]) -> Counter[tuple[str, Kind]]:
        """Bytes that the layers take in these places, and what brings them there, by device and kind."""
        need: Counter[tuple[str, Kind]] = Counter()
        passing: dict[tuple[str, Placement], list[int]] = defaultdict(list)
        for index, image in self._images.items():
            device, placement = image.backend.device.name, places[index]
            if placement == "resident":
                need[device, Kind.WEIGHTS] += image.nbytes
            else:
                passing[device, placement].append(image.nbytes if image.away else image.stored)
            if placement == "stream":
                need[HOST, Kind.WEIGHTS] += image.nbytes
        for (device, placement), sizes in passing.items():
            if device == HOST:
                need[HOST, Kind.STAGING] += min(MappedStream.HELD, len(sizes)) * max(sizes)
            elif placement == "stream":
                need[device, Kind.STAGING] += SLOTS * max(sizes)
            else:
                need[device, Kind.STAGING] += max(sizes)
                need[HOST, Kind.STAGING] += SLOTS * max(sizes)
        return need

    def move(self, places: Mapping[int, Placement]) -> None:
        """Have layers in other places from now on, those of the CPU where they are used or on disk. Not during a step,
        and only `layers` may hold them. Raises BudgetExceeded or UnsupportedError, and changes nothing, if that cannot
        be."""
        before, after = self.places, self.places | dict(places)
        changes = self.needed(after)
        changes.subtract(self.needed(before))
        self.weights.exchange(changes)
        try:
            self._arrange(after, places)
        except BaseException:
            self.weights.exchange({key: -nbytes for key, nbytes in changes.items()}, over=True)
            self._arrange(before, places)
            raise

    def load(self, source: Source) -> None:
        """Put a tensor where it belongs. Raises BudgetExceeded."""
        weights = self.weights
        if source.tensor.packable and weights.placement(source) == "stream":
            nbytes = weights.backend(source).weight_nbytes(weights.forms[source], source.tensor.shape)
            weights.reserve(HOST, Kind.WEIGHTS, nbytes)
            self._pack(source)
        elif not weights.stays(source):
            weights.load(source)
            weights.drop(source)

    def _pack(self, source: Source) -> None:
        """Write a tensor into the image of its layer in host memory."""
        assert source.tensor.layer is not None
        image = self._images[source.tensor.layer]
        host = self._hosts.get(source.tensor.layer)
        if host is None:
            host = self._hosts[source.tensor.layer] = image.backend.host_buffer(image.nbytes)
        image.backend.pack_weight(self.weights.read(source), host[image.places[source.tensor.name][2]])
        self.weights.drop(source)

    def _arrange(self, places: Mapping[int, Placement], moved: Collection[int]) -> None:
        """Bring the layers that are `moved` to their places, and make those of their devices anew. What was there goes
        before there is something new."""
        loaded, images = self.weights.builder.loaded, self._images
        for index in moved:
            if places[index] == "stream" and index not in self._hosts:
                for source in images[index].sources:
                    self._pack(source)
        devices = {self.device(index) for index in moved}
        mine = {index: image for index, image in images.items() if self.device(index) in devices}
        self._let_go(mine)
        for index in moved:
            if places[index] != "resident":
                for name in images[index].places:
                    loaded.pop(name, None)
        for index in moved:
            for source in images[index].sources if places[index] == "resident" else ():
                if source.tensor.name not in loaded:
                    loaded[source.tensor.name] = images[index].backend.load_weight(self.weights.read(source))
                    self.weights.drop(source)
        for index in mine:
            if places[index] != "stream":
                self._hosts.pop(index, None)
        self.places = dict(places)
        groups: dict[tuple[str, Placement], dict[int, LayerImage]] = defaultdict(dict)
        for index, image in mine.items():
            groups[self.device(index), places[index]][index] = image
        for (_, placement), group in groups.items():
            if placement != "resident":
                self.streams |= dict.fromkeys(map(self._part, group), self._stream(placement, group))
        for index in mine:
            if places[index] == "resident":
                self.layers[index] = self.weights.builder.layer(index)

    def _let_go(self, indices: Collection[int]) -> None:
        """Drop layers with the streams that bring them; nothing but what is loaded holds memory for them then."""
        streams = {id(stream): stream for i in indices if (stream := self.streams.pop(self._part(i), None)) is not None}
        for stream in streams.values():
            stream.close()
        for index in indices:
            self.layers[index] = None

    def _part(self, index: int) -> str:
        return f"layers.{index}.experts" if index in self.weights.backends.experts else f"layers.{index}"

    def _stream(self, placement: Placement, images: Mapping[int, LayerImage]) -> Stream[DecoderLayer]:
        """What brings the weights of some layers of a device, which are made with it. Raises UnsupportedError."""
        backend, make = next(iter(images.values())).backend, self.weights.builder.layer
        if backend.device.kind == "cpu":
            mapped = MappedStream[DecoderLayer](self._touch, self._drop)
            for i, image in images.items():
                bound = {source.tensor.name: self.weights.in_file(source) for source in image.sources}
                self.layers[i] = mapped.items[i] = make(i, bound)
            return mapped
        sizes = {i: image.nbytes for i, image in images.items()}
        largest, count = max(sizes.values()), SLOTS if placement == "stream" else 1
        slots = [backend.empty((largest,), "uint8") for _ in range(count)]
        layers = {i: [make(i, image.bind(slot)) for slot in slots] for i, image in images.items()}
        for i, (layer, *_) in layers.items():
            self.layers[i] = layer
        if placement == "stream":
            return SlotStream(backend, {i: self._hosts[i] for i in images}, slots, layers)
        buffers = [backend.host_buffer(largest) for _ in range(SLOTS)]
        return ReadStream(
            backend, self._read_image, sizes, buffers, slots[0], {i: made[0] for i, made in layers.items()}
        )

    def _read_image(self, index: int, out: HostBytes) -> None:
        image = self._images[index]
        for source, _, place in image.places.values():
            image.backend.pack_weight(self.weights.read(source), out[place])
            self.weights.drop(source)

    def _touch(self, index: int) -> None:
        for name in {n for s in self._images[index].sources if s.tensor.role != "experts" for n in s.names}:
            self.weights.checkpoint.prefetch(name)

    def _drop(self, index: int) -> None:
        for source in self._images[index].sources:
            self.weights.drop(source)
