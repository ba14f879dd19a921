"""What a model file says about its model, under the names of Hugging Face, every value checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

from chandra.errors import CheckpointError, UnsupportedError
from chandra.models.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RopeKind, RopeSpec
from chandra.ops.contracts import Activation

# What no model of today comes near; a file that claims more is damaged or hostile.
LIMITS = {"num_hidden_layers": 2048, "vocab_size": 1 << 24, "num_experts": 4096, "head_dim": 1 << 14}
MAX_WIDTH, MAX_TOKENS = 1 << 22, 1 << 31
TOKENS = ("max_position_embeddings", "original_max_position_embeddings", "sliding_window")
ACTIVATIONS: dict[str, Activation] = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "sigmoid": "sigmoid"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
ROPE_KINDS: dict[str, RopeKind] = {
    **{"default": "none", "none": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3"},
    **{"yarn": "yarn", "longrope": "longrope", "su": "longrope"},
}
LAYER_TYPES = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True)
class Facts:
    """A model description: `values` has the keys of a Hugging Face `config.json`. `has_head`: an output matrix of its
    own is stored (None: not known). Everything here raises CheckpointError for values that make no sense."""

    values: Mapping[str, Any]
    has_head: bool | None = None

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least` and no absurd size."""
        value = self._present(key, default)
        limit = MAX_TOKENS if key in TOKENS else LIMITS.get(key, MAX_WIDTH)
        if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= limit:
            raise absurd(key, value, f"a whole number from {least} to {limit} is expected")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
            raise absurd(key, value, "a finite number above 0 is expected")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A finite number above 0, or None where the file has none."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._present(key, default)
        if not isinstance(value, bool):
            raise absurd(key, value, "true or false is expected")
        return value

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None and default is None:
            raise CheckpointError(f"the model description lacks {key!r}", "the file is incomplete: fetch it again")
        return default if value is None else value

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
        return self.integer("head_dim", hidden // heads)

    def attention(self, **changes: Any) -> AttentionSpec:
        """Attention as the usual keys give it; `changes` are fields that the architecture states otherwise."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise absurd("num_key_value_heads", kv_heads, f"it does not divide the {heads} query heads")
        bias = self.flag("attention_bias")
        spec = AttentionSpec(heads, kv_heads, self.head_dim, self.head_dim**-0.5, bias=bias, out_bias=bias)
        return replace(spec, **({"rope": self.rope()} | changes))

    def mlp(self, size: int | None = None, **changes: Any) -> MlpSpec:
        """A dense MLP as the usual keys give it, but for `changes`."""
        name = str(self.get("hidden_act") or "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedError(f"activation {name!r} is not supported", f"supported: {', '.join(ACTIVATIONS)}")
        return replace(MlpSpec(size or self.integer("intermediate_size"), ACTIVATIONS[name]), **changes)

    def experts(self, size: int, normalize: bool) -> MlpSpec:
        """A mixture of experts, each of this intermediate size."""
        count = self.integer("num_experts", self.get("num_local_experts"))
        used = self.integer("num_experts_per_tok")
        if used > count:
            raise absurd("num_experts_per_tok", used, f"there are {count} experts")
        return self.mlp(size, num_experts=count, experts_per_token=used, normalize_experts=normalize)

    def window(self) -> int | None:
        """The sliding window of the layers that have one."""
        return None if self.get("sliding_window") is None else self.integer("sliding_window")

    def sliding(self, default: Sequence[bool]) -> list[bool]:
        """For each layer, whether it has a sliding window: as `layer_types` says, or else `default`."""
        types = self.get("layer_types")
        if self.window() is None:
            return [False] * len(default)
        if types is None:
            return list(default)
        if isinstance(types, list) and len(types) == len(default) and all(str(name) in LAYER_TYPES for name in types):
            return [LAYER_TYPES[name] for name in types]
        raise absurd("layer_types", types, f"{' or '.join(LAYER_TYPES)} is expected for each layer")

    def rope(self, layer_type: str | None = None) -> RopeSpec:
        """The rotary embedding: from `rope_parameters` (of this layer type, if it has them), or the older
        `rope_theta`, `partial_rotary_factor` and `rope_scaling`."""
        given = self.get("rope_parameters") or self.get("rope_scaling") or {}
        given = isinstance(given, Mapping) and (given.get(layer_type) or given)
        if not isinstance(given, Mapping):
            raise absurd("rope_scaling", self.get("rope_scaling"), "a table is expected")
        return _rope(Facts({**self.values, **{key: value for key, value in given.items() if value is not None}}))

    def model(
        self,
        arch: str,
        *,
        mlp: MlpSpec | Sequence[MlpSpec] | None = None,
        slides: Sequence[bool] | None = None,
        ropes: Mapping[bool, RopeSpec] | None = None,
        attention: Mapping[str, Any] | None = None,
        layer: Mapping[str, Any] | None = None,
        tied: bool = False,
        **changes: Any,
    ) -> ModelSpec:
        """The whole model. `slides` says which layers have the window (none), `ropes` which RoPE those and the others
        have (all the same); `attention` and `layer` are fields of all layers; `tied` is what the architecture does
        when the file does not say; `changes` are fields of the model."""
        count, eps = self.num_layers, self.number("rms_norm_eps", self.get("layer_norm_epsilon"))
        if eps >= 1:
            raise absurd("rms_norm_eps", eps, "it must be below 1")
        kinds = {
            slid: self.attention(
                window=self.window() if slid else None, rope=ropes[slid] if ropes else self.rope(), **(attention or {})
            )
            for slid in (True, False)
        }
        mlps = [mlp or self.mlp()] * count if mlp is None or isinstance(mlp, MlpSpec) else mlp
        layers = [LayerSpec(kinds[slid], mlps[i], **(layer or {})) for i, slid in enumerate(slides or [False] * count)]
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
    name = str(facts.get("rope_type") or facts.get("type") or "default")
    if name not in ROPE_KINDS:
        raise UnsupportedError(f"RoPE scaling {name!r} is not supported", f"supported: {', '.join(ROPE_KINDS)}")
    kind, head_dim = ROPE_KINDS[name], facts.head_dim
    rotary_dim = facts.integer("rotary_dim", int(head_dim * facts.number("partial_rotary_factor", 1.0)))
    if rotary_dim % 2 or rotary_dim > head_dim or (kind == "dynamic" and rotary_dim == 2):
        raise absurd("rotary_dim", rotary_dim, f"it must be even and at most the head size {head_dim}")
    theta = facts.number("rope_theta", 10000.0)
    if theta <= 1:
        raise absurd("rope_theta", theta, "it must be above 1")
    rope = RopeSpec(theta, rotary_dim, interleaved=facts.flag("rope_interleaved"), kind=kind)
    rope = replace(rope, freq_factors=_factors(facts, "freq_factors", rotary_dim))
    return rope if kind == "none" else _scaled(facts, rope)


def _scaled(facts: Facts, rope: RopeSpec) -> RopeSpec:
    """The RoPE with the parameters of its scaling."""
    length = facts.integer("max_position_embeddings", 2048)
    original = length if rope.kind == "dynamic" else facts.integer("original_max_position_embeddings", length, least=2)
    factor = facts.number("factor", length / original)
    low, high = facts.number("low_freq_factor", 1.0), facts.number("high_freq_factor", 4.0)
    if low >= high:
        raise absurd("high_freq_factor", high, f"it must be above low_freq_factor = {low}")
    short, long = (_factors(facts, key, rope.rotary_dim) for key in ("short_factor", "long_factor"))
    if rope.kind == "longrope" and not (short and long):
        raise absurd("rope_scaling", "longrope", "short_factor and long_factor are missing")
    return replace(
        rope,
        factor=factor,
        original_max_position=original,
        low_freq_factor=low,
        high_freq_factor=high,
        beta_fast=facts.number("beta_fast", 32.0),
        beta_slow=facts.number("beta_slow", 1.0),
        truncate=facts.flag("truncate", True),
        attention_factor=facts.number("attention_factor", _attention_factor(facts, rope.kind, factor, original)),
        short_factor=short,
        long_factor=long,
    )


def _attention_factor(facts: Facts, kind: RopeKind, factor: float, original: int) -> float:
    """What the scaling multiplies cos and sin with, where the file does not say."""
    if factor <= 1 or kind not in ("yarn", "longrope"):
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dims = facts.get("mscale"), facts.get("mscale_all_dim")
    if mscale and all_dims:
        return _yarn_scale(facts.number("mscale"), factor) / _yarn_scale(facts.number("mscale_all_dim"), factor)
    return _yarn_scale(1.0, factor)


def _yarn_scale(mscale: float, factor: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1


def _factors(facts: Facts, key: str, rotary_dim: int) -> tuple[float, ...] | None:
    values = facts.get(key)
    if values is None:
        return None
    if not isinstance(values, Sequence) or len(values) != rotary_dim // 2:
        raise absurd(key, values, f"{rotary_dim // 2} numbers are expected")
    return tuple(Facts({key: value}).number(key) for value in values)
