"""The tensor table of a model, and where each kind of checkpoint keeps its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from chandra.checkpoint.base import Checkpoint, TensorInfo
from chandra.errors import CheckpointError
from chandra.models.arch import ARCHS, Name, NameTable
from chandra.models.spec import LayerSpec, ModelSpec, Role, TensorSpec

Ranges = tuple[tuple[int, int], ...]


def tensor_table(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Every tensor the decoder needs, in the order it needs them. Names are those of Llama, Gemma and Qwen in Hugging
    Face form for all architectures; fused tensors stand here in their parts, experts stacked."""
    table = [TensorSpec("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size), "embedding")]
    for i, layer in enumerate(spec.layers):
        table += _layer_table(spec, layer, i)
    table += _norm(spec, "model.norm", spec.hidden_size, None)
    if not spec.tied_embeddings:
        table.append(TensorSpec("lm_head.weight", (spec.vocab_size, spec.hidden_size), "head"))
    return tuple(table)


def part_of(tensor: TensorSpec, spec: ModelSpec) -> str:
    """The part of a plan that a tensor belongs to, where experts lie apart: their norms and router lie with them."""
    if tensor.layer is None:
        return "embedding" if tensor.role == "embedding" else "head"
    layer, part = spec.layers[tensor.layer], f"layers.{tensor.layer}"
    if not layer.mlp.num_experts:
        return part
    norms = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if not layer.post_norms:
        norms = ["post_attention_layernorm"]
    with_experts = tensor.role in ("router", "experts") or tensor.name.split(".")[3] in norms
    return f"{part}.experts" if with_experts else part


def _layer_table(spec: ModelSpec, layer: LayerSpec, i: int) -> Iterator[TensorSpec]:
    prefix, hidden = f"model.layers.{i}.", spec.hidden_size
    a, mlp = layer.attention, layer.mlp
    q, kv, ff = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, mlp.intermediate_size

    def linear(name: str, out: int, columns: int, bias: bool, role: Role) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{prefix}{name}.weight", (out, columns), role, i)
        if bias:
            yield TensorSpec(f"{prefix}{name}.bias", (out,), role, i, packable=False)

    yield from _norm(spec, prefix + "input_layernorm", hidden, i)
    for name, out in (("q", q), ("k", kv), ("v", kv)):
        yield from linear(f"self_attn.{name}_proj", out, hidden, a.bias, "attention")
    if a.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield TensorSpec(f"{prefix}self_attn.{name}.weight", (a.head_dim,), "norm", i, packable=False)
    yield from linear("self_attn.o_proj", hidden, q, a.out_bias, "attention")
    if layer.post_norms or layer.mlp_norm:
        yield from _norm(spec, prefix + "post_attention_layernorm", hidden, i)
    if layer.post_norms:
        yield from _norm(spec, prefix + "pre_feedforward_layernorm", hidden, i)
    if mlp.num_experts:
        yield TensorSpec(prefix + "mlp.gate.weight", (mlp.num_experts, hidden), "router", i, packable=False)
        for name, shape in (("gate", (ff, hidden)), ("up", (ff, hidden)), ("down", (hidden, ff))):
            yield TensorSpec(f"{prefix}mlp.experts.{name}_proj.weight", (mlp.num_experts, *shape), "experts", i)
    else:
        if mlp.gated:
            yield from linear("mlp.gate_proj", ff, hidden, mlp.bias, "mlp")
        yield from linear("mlp.up_proj", ff, hidden, mlp.bias, "mlp")
        yield from linear("mlp.down_proj", hidden, ff, mlp.bias, "mlp")
    if layer.post_norms:
        yield from _norm(spec, prefix + "post_feedforward_layernorm", hidden, i)


def _norm(spec: ModelSpec, name: str, width: int, layer: int | None) -> Iterator[TensorSpec]:
    yield TensorSpec(name + ".weight", (width,), "norm", layer, packable=False)
    if spec.norm_kind == "layer":
        yield TensorSpec(name + ".bias", (width,), "norm", layer, packable=False)


def _names(prefix: str, table: Mapping[str, str]) -> dict[str, tuple[Name, ...]]:
    return {key: tuple(Name(prefix + name) for name in names.split()) for key, names in table.items()}


_EXPERTS = "model.layers.{i}.mlp.experts."
# By the name of the table above, less its suffix and `model.layers.{i}.`; the first that the file has is taken.
# `post_attention_norm` is `post_attention_layernorm` where it really is a norm after attention.
_HF = {
    "mlp.experts.gate_proj": (Name(_EXPERTS + "{e}.gate_proj"), Name(_EXPERTS + "gate_up_proj", "gate", bare=True)),
    "mlp.experts.up_proj": (Name(_EXPERTS + "{e}.up_proj"), Name(_EXPERTS + "gate_up_proj", "up", bare=True)),
    "mlp.experts.down_proj": (Name(_EXPERTS + "{e}.down_proj"), Name(_EXPERTS + "down_proj", bare=True)),
    "post_attention_norm": (Name("model.layers.{i}.post_attention_layernorm"),),
}
_GGUF = _names("", {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}) | _names(
    "blk.{i}.",
    {
        **{"input_layernorm": "attn_norm", "post_attention_norm": "post_attention_norm"},
        **{"post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm"},
        **{"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output"},
        **{"post_feedforward_layernorm": "post_ffw_norm", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp"},
        **{f"mlp.experts.{x}_proj": f"ffn_{x}_exps ffn_{x}.{{e}}" for x in ("gate", "up", "down")},
    },
)
_LITGPT = _names("", {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}) | _names(
    "transformer.h.{i}.",
    {
        **{"input_layernorm": "norm_1", "post_attention_norm": "post_attention_norm"},
        **{"post_attention_layernorm": "norm_2", "pre_feedforward_layernorm": "norm_2"},
        **{"self_attn.q_norm": "attn.norm_q", "self_attn.k_norm": "attn.norm_k", "self_attn.o_proj": "attn.proj"},
        **{"post_feedforward_layernorm": "post_mlp_norm", "mlp.down_proj": "mlp.proj", "mlp.gate": "mlp.gate"},
        **{"mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2 mlp.fc"},
        **{"mlp.experts.gate_proj": "mlp.experts.{e}.fc_1", "mlp.experts.up_proj": "mlp.experts.{e}.fc_2"},
        "mlp.experts.down_proj": "mlp.experts.{e}.proj",
    },
)
NAMES: dict[str, NameTable] = {
    "hf": _HF,
    "gguf": {
        **_GGUF,
        **{f"self_attn.{x}_proj": (Name(f"blk.{{i}}.attn_{x}"), Name("blk.{i}.attn_qkv", x)) for x in "qkv"},
        **{f"mlp.{x}_proj": (Name(f"blk.{{i}}.ffn_{x}"), Name("blk.{i}.ffn_up", x)) for x in ("gate", "up")},
    },
    "litgpt": {**_LITGPT, **{f"self_attn.{x}_proj": (Name("transformer.h.{i}.attn.qkv", x),) for x in "qkv"}},
}
PREFIXES = ("model.", "model.language_model.", "language_model.model.", "")


@dataclass(frozen=True)
class Source:
    """Where a tensor of the table comes from: the file's tensor, or one for each expert, to be stacked; `rows`, if
    any, are the ranges kept of it (of each expert); `offset` is added to its values."""

    tensor: TensorSpec
    names: tuple[str, ...]
    rows: Ranges = ()
    offset: float = 0.0

    @property
    def joined(self) -> bool:
        """Whether it lies in several places of the file."""
        return max(len(self.names), len(self.rows)) > 1 or (bool(self.rows) and len(self.tensor.shape) > 2)


def find_sources(spec: ModelSpec, checkpoint: Checkpoint) -> tuple[Source, ...]:
    """Where each tensor of the table is in this checkpoint. Raises CheckpointError, naming them, if tensors are missing
    or have other shapes than the model description says."""
    found, wrong = [], []
    for tensor in tensor_table(spec):
        source = _find(spec, tensor, checkpoint)
        if isinstance(source, Source):
            found.append(source)
        else:
            wrong.append(source)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"the tensors of {checkpoint.path.name} do not fit its description: {'; '.join(wrong[:5])}{more}",
            "the file is incomplete or damaged: fetch it again from its source",
        )
    return tuple(found)


def _find(spec: ModelSpec, tensor: TensorSpec, checkpoint: Checkpoint) -> Source | str:
    """The source, or what is wrong."""
    arch, kind, stored = ARCHS[spec.arch], checkpoint.kind, checkpoint.tensors
    base, suffix = tensor.name.rsplit(".", 1)
    layer = None if tensor.layer is None else spec.layers[tensor.layer]
    key = base if layer is None else base.split(".", 3)[3]
    if layer and layer.post_norms and key == "post_attention_layernorm":
        key = "post_attention_norm"
    offset = 1.0 if arch.unit_offset and kind != "gguf" and tensor.role == "norm" else 0.0
    problem = f"{tensor.name} is missing"
    for name in (*arch.names.get(kind, {}).get(key, ()), *NAMES[kind].get(key, (Name(base),))):
        names = _file_names(name, tensor, suffix, stored)
        rows, total = _rows(name, layer)
        shape = _file_shape(tensor.shape, total, "{e}" in name.base)
        bad = next((n for n in names if stored[n].shape != shape), None)
        if names and bad is None:
            return Source(tensor, names, rows, offset)
        if bad is not None:
            problem = f"{bad} has shape {stored[bad].shape}, expected {shape}"
    return problem


def _file_names(name: Name, tensor: TensorSpec, suffix: str, stored: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """The file's names for a tensor, () where it has none of that form."""
    base = name.base if name.bare else f"{name.base}.{suffix}"
    experts = range(tensor.shape[0]) if "{e}" in base else (0,)
    for prefix in PREFIXES if base.startswith("model.") else ("",):
        whole = prefix + base.removeprefix("model.")
        names = tuple(whole.format(i=tensor.layer, e=e) for e in experts)
        if all(n in stored for n in names):
            return names
    return ()


def _rows(name: Name, layer: LayerSpec | None) -> tuple[Ranges, int | None]:
    """The row ranges of a part of a fused tensor, and how many rows that has in all."""
    if not name.part or layer is None:
        return (), None
    if name.part in ("gate", "up"):
        ff = layer.mlp.intermediate_size
        return ((0, ff) if name.part == "gate" else (ff, 2 * ff),), 2 * ff
    a = layer.attention
    groups = a.num_kv_heads if name.grouped else 1
    q, kv = a.num_heads * a.head_dim // groups, a.num_kv_heads * a.head_dim // groups
    start, stop = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[name.part]
    stride = q + 2 * kv
    return tuple((g * stride + start, g * stride + stop) for g in range(groups)), groups * stride


def _file_shape(shape: tuple[int, ...], total: int | None, per_expert: bool) -> tuple[int, ...]:
    shape = shape[1:] if per_expert else shape
    if total is None:
        return shape
    return (total,) if len(shape) == 1 else (*shape[:-2], total, shape[-1])
