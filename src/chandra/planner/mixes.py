"""Which format each tensor gets under a label such as Q4_K_M.

A label names a mix: the rules are those of llama.cpp's quantizer (which tensors get more bits, what replaces a format
whose blocks do not divide a row), so that a plan made from shapes agrees with the file that will be downloaded.
"""

from __future__ import annotations

from chandra.errors import UsageError
from chandra.models.spec import ModelSpec, TensorSpec
from chandra.quant import get_format

# Best first. Those of LOW_QUALITY lose so much that the planner only chooses them when it is told to or must.
LABELS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
LOW_QUALITY = ("Q3_K_M", "Q2_K")
ON_REQUEST = ("F32", "BF16", "Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "IQ4_XS", "int8", "nf4", "nf4-dq")
ONE_FORMAT = ("F32", "F16", "BF16", "Q8_0", "int8", "nf4", "nf4-dq")  # for the head as for the rest

_BASE = {"Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q3_K_M": "Q3_K"}
_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def known_label(label: str) -> str:
    """The label in its usual spelling. Raises UsageError for one that is not known."""
    for known in (*LABELS, *ON_REQUEST):
        if known.lower() == label.lower():
            return known
    raise UsageError(f"unknown format {label!r}", f"known: {', '.join((*LABELS, *ON_REQUEST))}")


def format_for(label: str, tensor: TensorSpec, spec: ModelSpec) -> str:
    """Format name of one tensor under a label as `known_label` spells it."""
    if not tensor.packable:
        return "F32"
    base = _BASE.get(label, label)
    if label in ONE_FORMAT:
        return _fit(base, tensor)
    if tensor.role == "head" or (spec.tied_embeddings and tensor.role == "embedding"):
        return _fit("Q6_K", tensor)
    if tensor.layer is not None and label in ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"):
        base = _more(label, base, tensor, spec, tensor.layer)
    return _fit(base, tensor)


def _more(label: str, base: str, tensor: TensorSpec, spec: ModelSpec, layer: int) -> str:
    """What the tensors that matter most get instead of the label's base."""
    count, attention = spec.num_layers, spec.layers[layer].attention
    sharing = attention.num_heads // attention.num_kv_heads
    eight_experts = spec.layers[layer].mlp.num_experts == 8
    eighth = count // 8
    more_bits = layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2
    down, value = "down_proj" in tensor.name, "v_proj" in tensor.name
    if eight_experts and (value or "k_proj" in tensor.name):
        return "Q8_0"
    if eight_experts and "o_proj" in tensor.name:
        return "Q5_K"
    if label in ("Q5_K_M", "Q4_K_M"):
        if more_bits and (down or value):
            return "Q6_K"
        return "Q5_K" if value and count == 80 and sharing == 8 else base  # as in the 70B models of Llama
    if label == "Q3_K_M":
        if value:
            return "Q5_K" if layer < 2 else "Q4_K"
        if down:
            return "Q5_K" if layer < count // 16 else "Q4_K"
        return "Q4_K" if "o_proj" in tensor.name else base
    if value:
        return "Q4_K" if sharing >= 4 else "Q3_K"
    return "Q3_K" if down or "o_proj" in tensor.name else base


def _fit(name: str, tensor: TensorSpec) -> str:
    """The format, or the next one whose blocks divide the rows."""
    for choice in (name, _SMALLER_BLOCKS.get(name, "F16")):
        if tensor.shape[-1] % getattr(get_format(choice), "block_size", 1) == 0:
            return choice
    return "F16"
