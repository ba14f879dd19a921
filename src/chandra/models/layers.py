"""One decoder layer: its weights, and the calls that compute it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from chandra.models.spec import LayerSpec
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
)


def layer_width(layer: LayerSpec) -> int:
    """float32 values of scratch that a layer needs per row. q, k, v and the attention's output are dead when the MLP
    runs, unless both run in parallel."""
    a, ff = layer.attention, layer.mlp.intermediate_size if not layer.mlp.num_experts else 0
    attention = 2 * (a.num_heads + a.num_kv_heads) * a.head_dim
    return attention + ff if layer.parallel else max(attention, ff)


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

    @property
    def kind(self) -> Hashable:
        """Layers of one kind make the same calls, but for what is in their weights."""
        mlp = self.mlp
        if isinstance(mlp, Experts):
            weights = [mlp.gate, mlp.up, mlp.down]
        else:
            weights = [one.weight for one in (mlp.gate, mlp.up, mlp.down) if one]
        weights += [one.weight for one in (*self.qkv, self.out)]
        return self.spec, tuple(weight.format.name for weight in weights)

    def forward(self, backend: Backend, x: Array, scratch: list[Array], batch: ForwardBatch, kv: KVView) -> None:
        """Add this layer's attention and MLP to the hidden state x `(n, hidden)`."""
        self.attend(backend, x, scratch, batch, kv)
        self.feed(backend, x, scratch, batch, kv)

    def attend(self, backend: Backend, x: Array, scratch: list[Array], batch: ForwardBatch, kv: KVView) -> None:
        """Add the attention."""
        q, k, v, attended = scratch[:4]
        parallel = self.spec.parallel
        backend.norm_linear(x, self.input_norm, self.qkv, (q, k, v))
        if parallel and isinstance(self.mlp, Mlp):
            backend.gate_up(x, self.mlp_norm, self.mlp.gate, self.mlp.up, self.mlp.activation, scratch[4])
        layer, tables = kv.layer(self.index), kv.tables(self.index)
        backend.attention(q, k, v, batch, self.attention, layer, tables, attended)
        backend.linear_add(attended, self.out, self.post_attention_norm, x)

    def feed(self, backend: Backend, x: Array, scratch: list[Array], batch: ForwardBatch, kv: KVView) -> None:  # noqa: ARG002
        """Add the MLP."""
        if isinstance(self.mlp, Experts):
            backend.moe_add(x, self.mlp_norm, self.mlp, self.post_mlp_norm, x)
            return
        if not self.spec.parallel:
            backend.gate_up(x, self.mlp_norm, self.mlp.gate, self.mlp.up, self.mlp.activation, scratch[4])
        backend.linear_add(scratch[4], self.mlp.down, self.post_mlp_norm, x)
