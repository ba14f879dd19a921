"""The one decoder: a stack of layers described by a `ModelSpec`, composed of the ops of `Backend`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, TypeAlias

import numpy as np

from chandra.errors import BudgetExceeded
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.models.pipeline import MicroBatch, split, wavefront
from chandra.models.spec import LayerSpec, ModelSpec
from chandra.ops.contracts import (
    Activation,
    Array,
    AttentionParams,
    Backend,
    Experts,
    ForwardBatch,
    KVView,
    Linear,
    Norm,
    Weight,
)

FLOAT = 4  # bytes of an activation
Hidden: TypeAlias = np.ndarray[Any, Any]  # the state between layers, (n, hidden_size), on the host


@dataclass(frozen=True)
class Backends:
    """Which backend holds what: the embedding, each layer, and the final norm with the head."""

    embedding: Backend
    layers: tuple[Backend, ...]
    head: Backend

    @classmethod
    def all_on(cls, backend: Backend, num_layers: int) -> Backends:
        return cls(backend, (backend,) * num_layers, backend)

    def distinct(self) -> list[Backend]:
        """Every backend once, in the order the hidden state visits them."""
        return list({id(b): b for b in (self.embedding, *self.layers, self.head)}.values())


def layer_width(layer: LayerSpec) -> int:
    """float32 values of scratch that a layer needs per row. q, k, v and the attention's output are dead when the MLP
    runs, unless both run in parallel."""
    a, ff = layer.attention, layer.mlp.intermediate_size if not layer.mlp.num_experts else 0
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim
    return attention + ff if layer.parallel else max(attention, ff)


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


@dataclass(frozen=True, eq=False)
class Mlp:
    """A dense MLP."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One layer's weights and the calls that compute it."""

    spec: LayerSpec
    index: int
    input_norm: Norm
    qkv: tuple[Linear, Linear, Linear]
    attention: AttentionParams
    out: Linear
    post_attention_norm: Norm | None
    mlp_norm: Norm
    mlp: Mlp | Experts
    post_mlp_norm: Norm | None

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where q, k, v, the attention's output and the MLP's inner state lie in the scratch."""
        a, ff = self.spec.attention, self.spec.mlp.intermediate_size
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        attention = ((0, q), (q, kv), (q + kv, kv), (q + 2 * kv, q))
        if self.spec.mlp.num_experts:
            return attention
        return (*attention, (2 * (q + kv) if self.spec.parallel else 0, ff))

    def forward(self, backend: Backend, x: Array, scratch: list[Array], batch: ForwardBatch, kv: KVView) -> None:
        """Add this layer's attention and MLP to the hidden state x `(n, hidden)`."""
        q, k, v, attended = scratch[:4]
        parallel = self.spec.parallel
        backend.norm_linear(x, self.input_norm, self.qkv, (q, k, v))
        if parallel and isinstance(self.mlp, Mlp):
            backend.gate_up(x, self.mlp_norm, self.mlp.gate, self.mlp.up, self.mlp.activation, scratch[4])
        layer, tables = kv.layer(self.index), kv.tables(self.index)
        backend.attention(q, k, v, batch, self.attention, layer, tables, attended)
        backend.linear_add(attended, self.out, self.post_attention_norm, x)
        if isinstance(self.mlp, Experts):
            backend.moe_add(x, self.mlp_norm, self.mlp, self.post_mlp_norm, x)
            return
        if not parallel:
            backend.gate_up(x, self.mlp_norm, self.mlp.gate, self.mlp.up, self.mlp.activation, scratch[4])
        backend.linear_add(scratch[4], self.mlp.down, self.post_mlp_norm, x)


@dataclass(eq=False)
class Segment:
    """A run of work on one backend: perhaps the embedding, some layers, perhaps the logits."""

    backend: Backend
    layers: list[DecoderLayer] = field(default_factory=list)
    places: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    embeds: bool = False
    scores: bool = False


class Decoder:
    """A model on its backends. Made by `loader.load_decoder`; `close` gives its reservations back."""

    def __init__(
        self,
        spec: ModelSpec,
        backends: Backends,
        embedding: Weight,
        layers: Sequence[DecoderLayer],
        norm: Norm,
        head: Linear,
        ledger: Ledger,
        max_rows: int,
        max_logit_rows: int,
        reservations: Iterable[Reservation],
        micro_rows: int = 0,
    ) -> None:
        self.spec, self.backends, self.micro_rows = spec, backends, micro_rows
        self.embedding, self.layers, self.norm, self.head = embedding, tuple(layers), norm, head
        self.max_logit_rows = max_logit_rows
        self._reservations = list(reservations)
        self._workspaces: dict[int, Workspace] = {}
        self._workspace_reservations = {
            backend.device.name: ledger.reserve(backend.device.name, Kind.WORKSPACE, 0)
            for backend in backends.distinct()
        }
        self._reservations += self._workspace_reservations.values()
        try:
            self.resize(max_rows)
        except BaseException:
            self.close()
            raise
        self._segments = self._cut()
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
        segments = [s for s in self._segments if logit_rows or s.layers or s.embeds]
        parts = split(batch, kv, self.micro_rows) if self.micro_rows and len(segments) > 1 else []
        if len(parts) > 1:
            wavefront([partial(self._pass, segment, segment is segments[-1]) for segment in segments], parts)
            if logit_rows:
                self._score(self._workspaces[id(self.backends.head)].hidden[:rows], batch)
        else:
            hidden = None
            for segment in segments:
                hidden = self._visit(segment, segment is segments[-1], batch, kv, 0, hidden)
        if not logit_rows:
            return np.empty((0, self.spec.vocab_size), np.float32)
        return self.backends.head.download(self._logits(logit_rows))

    def _pass(self, segment: Segment, last: bool, part: MicroBatch, hidden: Hidden | None) -> Hidden | None:
        with self._locks[id(segment.backend)]:
            return self._visit(segment, last, part.batch, part, part.start, hidden)

    def _visit(
        self, segment: Segment, last: bool, batch: ForwardBatch, kv: KVView, start: int, hidden: Hidden | None
    ) -> Hidden | None:
        """Do a segment for a batch, or for one's rows from `start` on. `hidden`: the state that the segment before has
        left on the host; the result: this one's, unless it is the last."""
        backend, rows = segment.backend, slice(start, start + len(batch.token_ids))
        x = self._workspaces[id(backend)].hidden[rows]
        if hidden is not None:
            backend.write(hidden, x)
        tables = {id(t): t for t in (kv.tables(layer.index) for layer in segment.layers)}
        backend.step((segment, start), batch, tuple(tables.values()), partial(self._run, segment, x, batch, kv))
        return None if last else backend.download(x)

    def _run(self, segment: Segment, x: Array, batch: ForwardBatch, kv: KVView) -> None:
        """The ops of a segment on its hidden state."""
        backend, workspace = segment.backend, self._workspaces[id(segment.backend)]
        if segment.embeds:
            backend.embed(batch, self.embedding, self.spec.embedding_scale, x)
        for layer, places in zip(segment.layers, segment.places, strict=True):
            layer.forward(backend, x, workspace.scratch(len(x), places), batch, kv)
        if segment.scores and len(batch.logit_rows):
            self._score(x, batch)

    def _score(self, x: Array, batch: ForwardBatch) -> None:
        spec, out = self.spec, self._logits(len(batch.logit_rows))
        rows, scale, softcap = batch.logit_rows, spec.logit_scale, spec.logit_softcap
        self.backends.head.logits(x, rows, self.norm, self.head, scale, softcap, out)

    def _logits(self, rows: int) -> Array:
        """The buffer for rows of logits."""
        (out,) = self._workspaces[id(self.backends.head)].scratch(rows, ((0, self.spec.vocab_size),))
        return out

    def _cut(self) -> list[Segment]:
        """Runs of work that stay on one backend."""
        backends = self.backends
        embedding, *layers, head = (backends.embedding, *backends.layers, backends.head)
        segments = [Segment(embedding, embeds=True)]
        for layer, backend in zip(self.layers, layers, strict=True):
            if backend is not segments[-1].backend:
                segments.append(Segment(backend))
            segments[-1].layers.append(layer)
            segments[-1].places.append(layer.places)
        if head is not segments[-1].backend:
            segments.append(Segment(head))
        segments[-1].scores = True
        return segments

    def close(self) -> None:
        """Give the reservations back. The decoder must not be used after."""
        for reservation in self._reservations:
            reservation.release()
