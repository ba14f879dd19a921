"""What a model file says about its model, under the names of Hugging Face, every value checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

from chandra.errors import CheckpointError, UnsupportedError
from chandra.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RopeSpec
from chandra.ops.contracts import Activation

# What no model of today comes near; a file that claims more is damaged or hostile.
LIMITS = {
    "num_hidden_layers": 2048,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "head_dim": 1 << 14,
}
MAX_WIDTH = 1 << 22
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "sigmoid": "sigmoid",
}
RopeKind = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: dict[str, RopeKind] = {
    "default": "none",
    "none": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}


@dataclass(frozen=True)
class Facts:
    """A model description: `values` has the keys of a Hugging Face `config.json`. `has_head`: an output matrix of its
    own is stored (None: not known). Getters raise CheckpointError for values that make no sense."""

    values: Mapping[str, Any]
    has_head: bool | None = None

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least` and no absurd size."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise absurd(key, value, "a whole number is expected")
        limit = LIMITS.get(key, MAX_WIDTH)
        if not least <= int(value) <= limit:
            raise absurd(key, value, f"it must be between {least} and {limit}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise absurd(key, value, "a number is expected")
        if not math.isfinite(value) or value <= 0:
            raise absurd(key, value, "it must be finite and above 0")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A finite number above 0, or None where the file has none."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise absurd(key, value, "true or false is expected")
        return value

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"the model description lacks {key!r}", "the file is incomplete: fetch it again")
        return value

    @property
    def num_layers(self) -> int:
        return self.integer("num_hidden_layers")

    @property
    def hidden_size(self) -> int:
        return self.integer("hidden_size")

    @property
    def head_dim(self) -> int:
        heads, hidden = self.integer("num_attention_heads"), self.hidden_size
        if self.get("head_dim") is None and hidden % heads:
            raise absurd("num_attention_heads", heads, f"it does not divide the hidden size {hidden}")
        return self.integer("head_dim", hidden // heads or None)

    def activation(self) -> Activation:
        name = self.get("hidden_act") or "silu"
        if name not in ACTIVATIONS:
            raise UnsupportedError(f"activation {name!r} is not supported", f"supported: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def attention(self, **changes: Any) -> AttentionSpec:
        """Attention as the usual keys give it; `changes` are fields that the architecture states otherwise."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise absurd("num_key_value_heads", kv_heads, f"it does not divide the {heads} query heads")
        bias = self.flag("attention_bias")
        spec = AttentionSpec(heads, kv_heads, self.head_dim, self.head_dim**-0.5, bias=bias, out_bias=bias)
        return replace(spec, **({"rope": self.rope()} | changes))

    def mlp(self, **changes: Any) -> MlpSpec:
        size = self.integer("intermediate_size") if "intermediate_size" not in changes else 1
        return replace(MlpSpec(size, self.activation()), **changes)

    def experts(self, intermediate_size: int, normalize: bool) -> MlpSpec:
        """A mixture of experts, each of this size."""
        count = self.integer("num_experts", self.get("num_local_experts"))
        used = self.integer("num_experts_per_tok")
        if used > count:
            raise absurd("num_experts_per_tok", used, f"there are {count} experts")
        return self.mlp(
            intermediate_size=intermediate_size,
            num_experts=count,
            experts_per_token=used,
            normalize_experts=normalize,
        )

    def window(self) -> int | None:
        """The sliding window of the layers that have one."""
        return None if self.get("sliding_window") is None else self.integer("sliding_window")

    def sliding(self, default: Sequence[bool]) -> list[bool]:
        """For each layer, whether it has a sliding window: as `layer_types` says, or else `default`."""
        types = self.get("layer_types")
        if types is None or self.window() is None:
            return [slides and self.window() is not None for slides in default]
        known = {"sliding_attention": True, "full_attention": False}
        if not isinstance(types, list) or len(types) != self.num_layers or not set(types) <= known.keys():
            raise absurd("layer_types", types, f"{' or '.join(known)} is expected for each layer")
        return [known[name] for name in types]

    def rope(self, layer_type: str | None = None) -> RopeSpec:
        """The rotary embedding: from `rope_parameters` (of this layer type, if it has them), or the older
        `rope_theta`, `partial_rotary_factor` and `rope_scaling`."""
        given = self.get("rope_parameters") or self.get("rope_scaling") or {}
        given = given.get(layer_type) or given if isinstance(given, Mapping) else None
        if given is None:
            raise absurd("rope_scaling", self.get("rope_scaling"), "a table is expected")
        return _rope(Facts({**self.values, **{k: v for k, v in given.items() if v is not None}}))

    def model(self, arch: str, layers: Sequence[LayerSpec], *, tied: bool = False, **changes: Any) -> ModelSpec:
        """The whole model. `tied` is what the architecture does when the file does not say."""
        eps = self.number("rms_norm_eps", self.get("layer_norm_epsilon"))
        if eps >= 1:
            raise absurd("rms_norm_eps", eps, "it must be below 1")
        spec = ModelSpec(
            arch,
            self.integer("vocab_size"),
            self.hidden_size,
            tuple(layers),
            self.integer("max_position_embeddings", 2048),
            eps,
            tied_embeddings=self.flag("tie_word_embeddings", tied) or self.has_head is False,
        )
        return replace(spec, **changes)


def absurd(key: str, value: object, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the model description is wrong: {key} = {str(value)[:80]}: {reason}",
        "the file is damaged or not a model that Chandra knows: fetch it again from its source",
    )


def _rope(facts: Facts) -> RopeSpec:
    name = facts.get("rope_type") or facts.get("type") or "default"
    if name not in ROPE_KINDS:
        raise UnsupportedError(f"RoPE scaling {name!r} is not supported", f"supported: {', '.join(ROPE_KINDS)}")
    kind = ROPE_KINDS[name]
    partial = facts.number("partial_rotary_factor", 1.0)
    rotary_dim = facts.integer("rotary_dim", int(facts.head_dim * partial) or None)
    if rotary_dim % 2 or rotary_dim > facts.head_dim or (kind == "dynamic" and rotary_dim == 2):
        raise absurd("rotary_dim", rotary_dim, f"it must be even and at most the head size {facts.head_dim}")
    max_position = facts.integer("max_position_embeddings", 2048)
    original = max_position if kind == "dynamic" else facts.integer("original_max_position_embeddings", max_position)
    factor = facts.number("factor", max_position / original)
    theta = facts.number("rope_theta", 10000.0)
    if theta <= 1:
        raise absurd("rope_theta", theta, "it must be above 1")
    low, high = facts.number("low_freq_factor", 1.0), facts.number("high_freq_factor", 4.0)
    if low >= high:
        raise absurd("high_freq_factor", high, f"it must be above low_freq_factor = {low}")
    rope = RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        interleaved=facts.flag("rope_interleaved"),
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=facts.number("beta_fast", 32.0),
        beta_slow=facts.number("beta_slow", 1.0),
        truncate=facts.flag("truncate", True),
        attention_factor=facts.optional("attention_factor") or _attention_factor(facts, kind, factor, original),
        freq_factors=_factors(facts, "freq_factors", rotary_dim),
    )
    if kind != "longrope":
        return rope
    short, long = (_factors(facts, key, rotary_dim) for key in ("short_factor", "long_factor"))
    if short is None or long is None:
        raise absurd("rope_scaling", name, "short_factor and long_factor are missing")
    return replace(rope, short_factor=short, long_factor=long)


def _attention_factor(facts: Facts, kind: RopeKind, factor: float, original: int) -> float:
    """What the scaling multiplies cos and sin with, where the file does not say."""
    if factor <= 1:
        return 1.0
    if kind == "yarn":
        mscale, all_dims = facts.optional("mscale"), facts.optional("mscale_all_dim")
        if mscale and all_dims:
            return (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dims * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1
    return math.sqrt(1 + math.log(factor) / math.log(original)) if kind == "longrope" else 1.0


def _factors(facts: Facts, key: str, rotary_dim: int) -> tuple[float, ...] | None:
    values = facts.get(key)
    if values is None:
        return None
    if not isinstance(values, Sequence) or len(values) != rotary_dim // 2:
        raise absurd(key, values, f"{rotary_dim // 2} numbers are expected")
    return tuple(Facts({key: value}).number(key) for value in values)
