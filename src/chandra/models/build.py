"""Layers put together from loaded weights, by the names of their tensors."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from chandra.memory.ledger import Kind
from chandra.models.layers import DecoderLayer, Mlp
from chandra.models.rope import inv_freq, rope_bytes
from chandra.models.spec import ModelSpec, RopeSpec
from chandra.ops.contracts import AttentionParams, Backend, Experts, Linear, Norm, RopeParams, Weight

Loaded: TypeAlias = Mapping[str, Any]  # Weight, or float32 arrays of the backend


class LayerBuilder:
    """`loaded` is filled by the loader; `layers` are the backends that compute the layers' attention; `reserve` takes
    (device, kind, bytes)."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[Backend], context_length: int, reserve: Callable[[str, Kind, int], None]
    ) -> None:
        self.spec, self.backends, self.context_length, self._reserve = spec, layers, context_length, reserve
        self.loaded: dict[str, Any] = {}
        self._ropes: dict[tuple[RopeSpec, int], RopeParams] = {}
        self._attentions: dict[int, AttentionParams] = {}

    def layer(self, i: int, bound: Mapping[str, Weight] | None = None) -> DecoderLayer:
        """A layer; `bound` are weights of it that take the place of loaded ones."""
        layer, prefix, have = self.spec.layers[i], f"model.layers.{i}.", ChainMap(dict(bound or {}), self.loaded)
        q, k, v, out = (_linear(have, f"{prefix}self_attn.{x}_proj") for x in "qkvo")
        if layer.post_norms:
            mlp_norm = "pre_feedforward_layernorm"
        else:
            mlp_norm = "post_attention_layernorm" if layer.mlp_norm else "input_layernorm"
        return DecoderLayer(
            spec=layer,
            index=i,
            input_norm=self.norm(prefix + "input_layernorm"),
            qkv=(q, k, v),
            attention=self._attention(i),
            out=out,
            post_attention_norm=self.norm(prefix + "post_attention_layernorm") if layer.post_norms else None,
            mlp_norm=self.norm(prefix + mlp_norm),
            mlp=self._experts(i, have) if layer.mlp.num_experts else self._mlp(i, have),
            post_mlp_norm=self.norm(prefix + "post_feedforward_layernorm") if layer.post_norms else None,
        )

    def norm(self, name: str) -> Norm:
        weight, bias = self.loaded[name + ".weight"], self.loaded.get(name + ".bias")
        return Norm(weight, self.spec.norm_eps, self.spec.norm_kind, bias)

    def _attention(self, i: int) -> AttentionParams:
        """One object for each layer: backends know it by its identity."""
        if i not in self._attentions:
            a, prefix = self.spec.layers[i].attention, f"model.layers.{i}."
            norms = [self.norm(f"{prefix}self_attn.{x}_norm") if a.qk_norm else None for x in "qk"]
            rope = self._rope(a.rope, self.backends[i]) if a.rope else None
            self._attentions[i] = AttentionParams(
                a.num_heads, a.num_kv_heads, a.head_dim, a.scale, a.window, a.softcap, rope, norms[0], norms[1]
            )
        return self._attentions[i]

    def _rope(self, rope: RopeSpec, backend: Backend) -> RopeParams:
        key = (rope, id(backend))
        if key not in self._ropes:
            self._reserve(backend.device.name, Kind.WEIGHTS, rope_bytes([rope]))
            frequencies = backend.upload(inv_freq(rope, self.context_length))
            self._ropes[key] = RopeParams(frequencies, rope.attention_factor, rope.interleaved)
        return self._ropes[key]

    def _mlp(self, i: int, have: Loaded) -> Mlp:
        spec, prefix = self.spec.layers[i].mlp, f"model.layers.{i}.mlp."
        gate = _linear(have, prefix + "gate_proj") if spec.gated else None
        return Mlp(gate, _linear(have, prefix + "up_proj"), _linear(have, prefix + "down_proj"), spec.activation)

    def _experts(self, i: int, have: Loaded) -> Experts:
        spec, prefix = self.spec.layers[i].mlp, f"model.layers.{i}.mlp."
        gate, up, down = (have[f"{prefix}experts.{x}_proj.weight"] for x in ("gate", "up", "down"))
        router = _linear(have, prefix + "gate")
        top_k, normalize = spec.experts_per_token, spec.normalize_experts
        return Experts(router, gate, up, down, top_k, normalize, spec.activation)


def _linear(have: Loaded, name: str) -> Linear:
    return Linear(have[name + ".weight"], have.get(name + ".bias"))
