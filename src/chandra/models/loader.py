"""From a checkpoint to a `Decoder`: tensor by tensor, every byte reserved before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from chandra.checkpoint.base import Checkpoint
from chandra.memory.ledger import Kind, Ledger, Reservation
from chandra.models.decoder import Backends, Decoder, DecoderLayer, Mlp
from chandra.models.rope import inv_freq, rope_bytes
from chandra.models.spec import AttentionSpec, ModelSpec, RopeSpec
from chandra.models.tensors import Source, find_sources
from chandra.models.transforms import concatenate, convert, floats, loading_bytes, take_rows
from chandra.ops.contracts import AttentionParams, Backend, Experts, Linear, Norm, RopeParams
from chandra.quant import Format, PackedWeight, get_format

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
    loading = _Loading(checkpoint, spec, backends, ledger, context_length)
    forms = {source.tensor.name: get_format(wanted[source.tensor.name]) for source in sources}
    passing = {s.tensor.name: passing_bytes(s, forms[s.tensor.name], checkpoint) for s in sources}
    total, done = sum(forms[s.tensor.name].nbytes(s.tensor.shape) for s in sources), 0
    try:
        for source in sorted(
            sources, key=lambda s: -passing[s.tensor.name]
        ):  # the most comes first, while there is room
            name = source.tensor.name
            nbytes = forms[name].nbytes(source.tensor.shape)
            on_its_way = ledger.reserve("cpu", Kind.LOADING, passing[name])
            try:
                loading.load(source, forms[name], nbytes)
            finally:
                on_its_way.release()
            done += nbytes
            if progress is not None:
                progress(done, total)
        return loading.decoder(max_rows, max_logit_rows, micro_rows)
    except BaseException:
        loading.release()
        raise


def passing_bytes(source: Source, form: Format, checkpoint: Checkpoint) -> int:
    """Host bytes that a tensor takes while it is loaded, besides those it will have in its place."""
    stored = get_format(checkpoint.tensors[source.names[0]].format)
    return loading_bytes(stored, form, source.tensor.shape, source.joined)


def stored_formats(sources: Iterable[Source], checkpoint: Checkpoint) -> dict[str, str]:
    """The format in which each tensor of the table is loaded, if it is not converted."""
    return {
        source.tensor.name: checkpoint.tensors[source.names[0]].format if source.tensor.packable else "F32"
        for source in sources
    }


class _Loading:
    """The state of one `load_decoder`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        backends: Backends,
        ledger: Ledger,
        context_length: int,
    ) -> None:
        self.checkpoint, self.spec, self.backends, self.ledger = checkpoint, spec, backends, ledger
        self.context_length = context_length
        self.loaded: dict[str, Any] = {}  # Weight, or float32 arrays of the backend
        self.ropes: dict[tuple[RopeSpec, int], RopeParams] = {}
        self.reservations: dict[tuple[str, Kind], Reservation] = {}

    def release(self) -> None:
        for reservation in self.reservations.values():
            reservation.release()

    def load(self, source: Source, form: Format, nbytes: int) -> None:
        name = source.tensor.name
        targets = {name: self._backend(source)}
        if name == EMBEDDING and self.spec.tied_embeddings and self.backends.head is not self.backends.embedding:
            targets[HEAD] = self.backends.head
        separate_head = not self.spec.tied_embeddings or HEAD in targets
        weight = self._read(source, form)
        as_stored = form.name == self.checkpoint.tensors[source.names[0]].format and not source.joined
        for key, backend in targets.items():
            lookup = key == EMBEDDING and separate_head
            kind = Kind.PAGE_CACHE if lookup and as_stored and backend.device.kind == "cpu" else Kind.WEIGHTS
            self._reserve(backend, kind, nbytes)
            if source.tensor.packable or source.tensor.role == "router":
                self.loaded[key] = backend.load_weight(weight, lookup)
                self._reserve(backend, kind, self.loaded[key].nbytes - nbytes)
            else:
                self.loaded[key] = backend.upload(weight.parts["data"].view(np.float32))
        for stored in source.names:
            self.checkpoint.release(stored)

    def _backend(self, source: Source) -> Backend:
        if source.tensor.layer is not None:
            return self.backends.layers[source.tensor.layer]
        return self.backends.embedding if source.tensor.role == "embedding" else self.backends.head

    def _reserve(self, backend: Backend, kind: Kind, nbytes: int) -> None:
        key = backend.device.name, kind
        if key not in self.reservations:
            self.reservations[key] = self.ledger.reserve(*key, 0)
        self.reservations[key].resize(self.reservations[key].nbytes + nbytes)

    def _read(self, source: Source, form: Format) -> PackedWeight:
        if not source.tensor.packable:
            values = floats(self.checkpoint.read(source.names[0]), source.tensor.name) + np.float32(source.offset)
            if source.rows:
                values = np.concatenate([values[start:stop] for start, stop in source.rows])
            return PackedWeight(form, source.tensor.shape, {"data": values.view(np.uint8)})
        stored = [take_rows(self.checkpoint.read(name), source.rows) for name in source.names]
        weight = stored[0] if len(stored) == 1 else concatenate(stored, source.tensor.shape)
        return weight if form.name == weight.format.name else convert(weight, form)

    def decoder(self, max_rows: int, max_logit_rows: int, micro_rows: int) -> Decoder:
        loaded, backends = self.loaded, self.backends
        return Decoder(
            self.spec,
            backends,
            loaded[EMBEDDING],
            [self._layer(i) for i in range(self.spec.num_layers)],
            self._norm("model.norm"),
            Linear(loaded.get(HEAD, loaded[EMBEDDING])),
            self.ledger,
            max_rows,
            max_logit_rows,
            tuple(self.reservations.values()),
            micro_rows,
        )

    def _layer(self, i: int) -> DecoderLayer:
        layer, prefix = self.spec.layers[i], f"model.layers.{i}."
        q, k, v, out = (self._linear(f"{prefix}self_attn.{x}_proj") for x in "qkvo")
        if layer.post_norms:
            mlp_norm = "pre_feedforward_layernorm"
        else:
            mlp_norm = "post_attention_layernorm" if layer.mlp_norm else "input_layernorm"
        return DecoderLayer(
            spec=layer,
            index=i,
            input_norm=self._norm(prefix + "input_layernorm"),
            qkv=(q, k, v),
            attention=self._attention(layer.attention, prefix, self.backends.layers[i]),
            out=out,
            post_attention_norm=self._norm(prefix + "post_attention_layernorm") if layer.post_norms else None,
            mlp_norm=self._norm(prefix + mlp_norm),
            mlp=self._experts(i) if layer.mlp.num_experts else self._mlp(i),
            post_mlp_norm=self._norm(prefix + "post_feedforward_layernorm") if layer.post_norms else None,
        )

    def _linear(self, name: str) -> Linear:
        return Linear(self.loaded[name + ".weight"], self.loaded.get(name + ".bias"))

    def _norm(self, name: str) -> Norm:
        weight, bias = self.loaded[name + ".weight"], self.loaded.get(name + ".bias")
        return Norm(weight, self.spec.norm_eps, self.spec.norm_kind, bias)

    def _attention(self, a: AttentionSpec, prefix: str, backend: Backend) -> AttentionParams:
        norms = [self._norm(f"{prefix}self_attn.{x}_norm") if a.qk_norm else None for x in "qk"]
        rope = self._rope(a.rope, backend) if a.rope else None
        return AttentionParams(
            a.num_heads, a.num_kv_heads, a.head_dim, a.scale, a.window, a.softcap, rope, norms[0], norms[1]
        )

    def _rope(self, rope: RopeSpec, backend: Backend) -> RopeParams:
        key = (rope, id(backend))
        if key not in self.ropes:
            self._reserve(backend, Kind.WEIGHTS, rope_bytes([rope]))
            frequencies = backend.upload(inv_freq(rope, self.context_length))
            self.ropes[key] = RopeParams(frequencies, rope.attention_factor, rope.interleaved)
        return self.ropes[key]

    def _mlp(self, i: int) -> Mlp:
        spec, prefix = self.spec.layers[i].mlp, f"model.layers.{i}.mlp."
        gate = self._linear(prefix + "gate_proj") if spec.gated else None
        return Mlp(gate, self._linear(prefix + "up_proj"), self._linear(prefix + "down_proj"), spec.activation)

    def _experts(self, i: int) -> Experts:
        spec, prefix = self.spec.layers[i].mlp, f"model.layers.{i}.mlp."
        gate, up, down = (self.loaded[f"{prefix}experts.{x}_proj.weight"] for x in ("gate", "up", "down"))
        router = self._linear(prefix + "gate")
        top_k, normalize = spec.experts_per_token, spec.normalize_experts
        return Experts(router, gate, up, down, top_k, normalize, spec.activation)
