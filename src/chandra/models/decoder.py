"""The one decoder: a stack of layers described by a `ModelSpec`, composed of the ops of `Backend`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from chandra.errors import BudgetExceeded, CheckpointError
from chandra.memory.ledger import Kind, Ledger
from chandra.memory.plan import Placement
from chandra.models.layers import DecoderLayer, layer_width
from chandra.models.mover import Mover
from chandra.models.pipeline import MicroBatch, split, wavefront
from chandra.models.spec import ModelSpec
from chandra.models.weight_stream import MappedHead, Stream
from chandra.models.weights import Backends
from chandra.ops.contracts import Array, Backend, ForwardBatch, KVLayer, KVTables, KVView, Linear, Norm, Weight

FLOAT = 4  # bytes of an activation
Hidden: TypeAlias = np.ndarray[Any, Any]  # the state between layers, (n, hidden_size), on the host


def workspace_bytes(spec: ModelSpec, layers: Iterable[int], max_rows: int, max_logit_rows: int = 0) -> int:
    """Bytes the decoder allocates on a device that holds these layers, for batches of up to `max_rows` tokens and (on
    the device of the head) `max_logit_rows` rows of logits. Nothing is allocated."""
    width = max((layer_width(spec.layers[i]) for i in layers), default=0)
    scratch = max(max_rows * width, max_logit_rows * spec.vocab_size)
    return FLOAT * (max_rows * spec.hidden_size + scratch)


class Workspace:
    """The decoder's buffers on one backend: the hidden state, and scratch that layers and logits use in turn."""

    def __init__(self, backend: Backend, nbytes: int, max_rows: int, hidden_size: int) -> None:
        self.hidden = backend.empty((max_rows, hidden_size), "float32")
        self._scratch = backend.empty((nbytes // FLOAT - max_rows * hidden_size,), "float32")
        self._rows = -1
        self._views: dict[tuple[tuple[int, int], ...], list[Array]] = {}

    def scratch(self, rows: int, places: tuple[tuple[int, int], ...]) -> list[Array]:
        """`(rows, width)` arrays at these (offset, width), both in values per row."""
        if rows != self._rows:
            self._rows = rows
            self._views.clear()
        views = self._views.get(places)
        if views is None:
            views = [self._scratch[o * rows : (o + w) * rows].reshape(rows, w) for o, w in places]
            self._views[places] = views
        return views


class Piece(NamedTuple):
    """A layer, or its attention or MLP where they lie apart: `run` is that method of `DecoderLayer`."""

    layer: DecoderLayer
    run: Callable[[DecoderLayer, Backend, Array, list[Array], ForwardBatch, KVView], None]
    places: tuple[tuple[int, int], ...]
    stream: Stream[DecoderLayer] | None  # that has its weights


@dataclass(eq=False)
class Segment:
    """A run of work on one backend: perhaps the embedding, some layers, perhaps the logits. All of its layers are
    streamed, or none."""

    backend: Backend
    pieces: list[Piece] = field(default_factory=list)
    embeds: bool = False
    scores: bool = False
    streamed: bool = False


class _Rehearsed(NamedTuple):
    """A view of the cache for steps that are not computed."""

    layer: Callable[[int], KVLayer]
    every: KVTables

    def tables(self, index: int) -> KVTables:  # noqa: ARG002
        return self.every


class Decoder:
    """A model on its backends. Made by `loader.load_decoder`; `close` gives its reservations back."""

    def __init__(
        self,
        spec: ModelSpec,
        backends: Backends,
        embedding: Weight,
        norm: Norm,
        head: Linear | MappedHead,
        ledger: Ledger,
        mover: Mover,
        max_rows: int,
        max_logit_rows: int,
        micro_rows: int = 0,
    ) -> None:
        self.spec, self.backends, self.micro_rows = spec, backends, micro_rows
        self.embedding, self.norm, self.head = embedding, norm, head
        self.max_logit_rows, self.mover = max_logit_rows, mover
        self._workspaces: dict[int, Workspace] = {}
        self._workspace_reservations = {
            backend.device.name: ledger.reserve(backend.device.name, Kind.WORKSPACE, 0)
            for backend in backends.distinct()
        }
        try:
            self.resize(max_rows)
        except BaseException:
            self.close()
            raise
        self._segments: list[Segment] = []  # made when they are needed
        self._locks = {id(backend): Lock() for backend in backends.distinct()}

    def workspace(self, max_rows: int) -> dict[str, int]:
        """Bytes of the workspace of each device for batches of up to `max_rows` tokens."""
        out = {}
        for backend in self.backends.distinct():
            held = [i for i, other in enumerate(self.backends.layers) if other is backend]
            logit_rows = self.max_logit_rows if backend is self.backends.head else 0
            out[backend.device.name] = workspace_bytes(self.spec, held, max_rows, logit_rows)
        return out

    def resize(self, max_rows: int) -> None:
        """Have workspace for batches of up to `max_rows` tokens. Raises BudgetExceeded, and changes nothing, if a
        device has no room for it."""
        needed = self.workspace(max_rows)
        before = {name: reservation.nbytes for name, reservation in self._workspace_reservations.items()}
        try:
            for name, nbytes in needed.items():
                self._workspace_reservations[name].resize(nbytes)
        except BudgetExceeded:
            for name, nbytes in before.items():
                self._workspace_reservations[name].resize(nbytes)
            raise
        self._workspaces.clear()  # before new memory is asked for
        for backend in self.backends.distinct():
            backend.forget_steps()
            nbytes = needed[backend.device.name]
            self._workspaces[id(backend)] = Workspace(backend, nbytes, max_rows, self.spec.hidden_size)
        self.max_rows = max_rows

    def forward(self, batch: ForwardBatch, kv: KVView) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Run one batch: its keys and values are added to the cache; returns the logits of `batch.logit_rows`.

        The result is float32 `(r, vocab)` on the host and holds until the next call.
        """
        rows, logit_rows = len(batch.token_ids), len(batch.logit_rows)
        if rows > self.max_rows or logit_rows > self.max_logit_rows:
            raise ValueError(f"a batch of {rows} rows, {logit_rows} of them wanted, is more than was planned for")
        self._segments = self._segments or self._cut()
        segments = [s for s in self._segments if logit_rows or s.pieces or s.embeds]
        stays = [a.backend is b.backend for a, b in pairwise(segments)] + [True]
        whole = len(segments) == 1 or self.mover.streams or self.backends.experts or not self.micro_rows
        parts = [] if whole else split(batch, kv, self.micro_rows)
        if len(parts) > 1:
            wavefront([partial(self._pass, *stage) for stage in zip(segments, stays, strict=True)], parts)
            if logit_rows:
                self._score(self._workspaces[id(self.backends.head)].hidden[:rows], batch)
        else:
            hidden = None
            for segment, stay in zip(segments, stays, strict=True):
                hidden = self._visit(segment, stay, batch, kv, 0, hidden)
        if not logit_rows:
            return np.empty((0, self.spec.vocab_size), np.float32)
        return self.backends.head.download(self._logits(logit_rows))

    def rehearse(self, cache: Callable[[int], KVLayer], blocks: int, told: Callable[[int, int], None]) -> None:
        """Let the devices get ready for steps of all sizes, without computing them. `cache`: the keys and values of a
        layer; `blocks`: of the longest sequence; `told`: see `Backend.rehearse`."""
        for backend in self.backends.distinct():
            mine = [segment for segment in self._cut() if segment.backend is backend]
            pieces = {piece.layer.kind: piece._replace(stream=None) for segment in mine for piece in segment.pieces}
            ends = any(segment.embeds for segment in mine), any(segment.scores for segment in mine)
            segment = Segment(backend, list(pieces.values()), *ends)
            backend.rehearse(partial(self._rehearse, segment, cache, blocks), told)

    def _rehearse(self, segment: Segment, cache: Callable[[int], KVLayer], blocks: int) -> None:
        """Steps of 1, 2, 4, … rows: decodes, as far as there may be so many, then prefills."""
        for n in (*(1 << i for i in range((self.max_rows - 1).bit_length())), self.max_rows):
            starts = np.arange(n + 1, dtype=np.int32) if n <= self.max_logit_rows else np.array([0, n], np.int32)
            none, ends = np.zeros(n, np.int32), starts[1:]
            batch = ForwardBatch(none, none, starts, np.diff(starts), ends - 1)
            tables = KVTables(np.zeros((len(ends), blocks), np.int32), none)
            self._run(segment, self._workspaces[id(segment.backend)].hidden[:n], batch, _Rehearsed(cache, tables))

    def _pass(self, segment: Segment, stay: bool, part: MicroBatch, hidden: Hidden | None) -> Hidden | None:
        with self._locks[id(segment.backend)]:
            return self._visit(segment, stay, part.batch, part, part.start, hidden)

    def _visit(
        self, segment: Segment, stay: bool, batch: ForwardBatch, kv: KVView, start: int, hidden: Hidden | None
    ) -> Hidden | None:
        """Do a segment for a batch, or for one's rows from `start` on. `hidden`: the state that the segment before has
        left on the host, None if it lies here; the result: this one's, None if it can `stay`."""
        backend, rows = segment.backend, slice(start, start + len(batch.token_ids))
        x = self._workspaces[id(backend)].hidden[rows]
        if hidden is not None:
            backend.write(hidden, x)
        run = partial(self._run, segment, x, batch, kv)
        tables = {id(t): t for t in (kv.tables(piece.layer.index) for piece in segment.pieces)}
        known = None if segment.streamed else (segment, start)  # streamed layers lie elsewhere in each step
        backend.step(known, batch, tuple(tables.values()), run)
        return None if stay else backend.download(x)

    def _run(self, segment: Segment, x: Array, batch: ForwardBatch, kv: KVView) -> None:
        """The ops of a segment on its hidden state."""
        backend, workspace = segment.backend, self._workspaces[id(segment.backend)]
        if segment.embeds:
            backend.embed(batch, self.embedding, self.spec.embedding_scale, x)
            self.mover.drop_rows()
        for layer, run, places, stream in segment.pieces:
            scratch = workspace.scratch(len(x), places)
            if stream is None:
                run(layer, backend, x, scratch, batch, kv)
            else:
                run(stream.acquire(layer.index), backend, x, scratch, batch, kv)
                stream.release(layer.index)
        if segment.scores and len(batch.logit_rows):
            self._score(x, batch)

    def _score(self, x: Array, batch: ForwardBatch) -> None:
        spec, out = self.spec, self._logits(len(batch.logit_rows))
        rows, scale, softcap = batch.logit_rows, spec.logit_scale, spec.logit_softcap
        if isinstance(self.head, MappedHead):
            self.head.logits(self.backends.head, x, rows, self.norm, scale, softcap, out)
        else:
            self.backends.head.logits(x, rows, self.norm, self.head, scale, softcap, out)

    def _logits(self, rows: int) -> Array:
        """The buffer for rows of logits."""
        (out,) = self._workspaces[id(self.backends.head)].scratch(rows, ((0, self.spec.vocab_size),))
        return out

    def _cut(self) -> list[Segment]:
        """Runs of work that stay on one backend."""
        segments = [Segment(self.backends.embedding, embeds=True)]

        def enter(backend: Backend, streamed: bool) -> Segment:
            last = segments[-1]
            if backend is not last.backend or streamed != last.streamed:
                segments.append(Segment(backend, streamed=streamed))
            return segments[-1]

        for layer, backend in zip(self.mover.layers, self.backends.layers, strict=True):
            if layer is None:
                raise CheckpointError("the weights of a layer could not be read again", "load the model anew")
            part, apart = f"layers.{layer.index}", self.backends.experts.get(layer.index)
            works = [(part, backend, DecoderLayer.attend if apart else DecoderLayer.forward)]
            if apart:
                works.append((f"{part}.experts", apart, DecoderLayer.feed))
            for name, where, run in works:
                stream = self.mover.streams.get(name)
                enter(where, stream is not None).pieces.append(Piece(layer, run, layer.places, stream))
        enter(self.backends.head, False).scores = True
        return segments

    def move(self, places: Mapping[int, Placement]) -> None:
        """Have the weights of layers in other places from now on: where they are computed ("resident"), in host memory
        ("stream"), or in the file ("disk"). The tokens stay the same. Raises BudgetExceeded or UnsupportedError, and
        changes nothing, if that cannot be. Not during a step."""
        self._segments = []  # they hold the layers, and so do the records of steps
        for backend in self.backends.distinct():
            backend.forget_steps()
        self.mover.move(places)

    def close(self) -> None:
        """Give all memory and the reservations back; doing so twice is harmless. It must not be used after."""
        if not self.mover.layers:
            return
        if isinstance(self.head, MappedHead):
            self.head.close()
        self.mover.release()
        for reservation in self._workspace_reservations.values():
            reservation.release()
        self._workspaces.clear()  # now, rather than when the garbage collector comes by
        self._segments = []
        del self.embedding, self.head
