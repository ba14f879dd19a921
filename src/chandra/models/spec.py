"""What a model is: one `ModelSpec` with one `LayerSpec` per layer, and the table of its tensors.

Planner, loader, converter and tests share it; it is built from headers alone, never from weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chandra.ops.contracts import Activation

RopeKind = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
Role = Literal["embedding", "head", "norm", "attention", "mlp", "router", "experts"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of a layer. `kind` names the scaling; its parameters follow the Hugging Face names.

    `original_max_position` is the context length of pretraining; `attention_factor` multiplies cos and sin.
    """

    theta: float
    rotary_dim: int
    interleaved: bool = False
    kind: RopeKind = "none"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    freq_factors: tuple[float, ...] | None = None  # GGUF rope_freqs.weight: inv_freq is divided by these


@dataclass(frozen=True)
class AttentionSpec:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: RopeSpec | None = None
    qk_norm: bool = False
    bias: bool = False  # on q, k, v
    out_bias: bool = False


@dataclass(frozen=True)
class MlpSpec:
    intermediate_size: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    num_experts: int = 0  # 0: dense
    experts_per_token: int = 0
    normalize_experts: bool = True


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. `parallel`: attention and MLP read the same input (Falcon); `mlp_norm` is False when they
    also share its norm. `post_norms`: attention and MLP outputs are normed before the residual add (Gemma 2, 3)."""

    attention: AttentionSpec
    mlp: MlpSpec
    parallel: bool = False
    mlp_norm: bool = True
    post_norms: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model."""

    arch: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    norm_eps: float
    norm_kind: Literal["rms", "layer"] = "rms"
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor the decoder needs: its Hugging Face name, logical shape, role and layer (None: outside the layers)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    packable: bool = True  # False: small, kept in float32 (norms, biases)
