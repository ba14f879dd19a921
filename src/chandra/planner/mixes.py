"""Which format each tensor gets under a label such as Q4_K_M.

A label names a mix: the rules are those of llama.cpp's quantizer (which tensors get more bits, what replaces a format
whose blocks do not divide a row), so that a plan made from shapes agrees with the file that will be downloaded.
"""

from __future__ import annotations

from collections.abc import Callable

from chandra.errors import UsageError
from chandra.models.spec import TensorSpec
from chandra.quant import get_format

# Best first. Labels below LOW_QUALITY lose enough that the planner only chooses them when it is told to or must.
LABELS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
LOW_QUALITY = ("Q3_K_M", "Q2_K")
ONE_FORMAT = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "int8", "nf4", "nf4-dq")

_SMALLER_BLOCKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def format_for(label: str, tensor: TensorSpec, num_layers: int, tied: bool, gqa: int) -> str:
    """Format name of one tensor under a label. Raises UsageError for a label that is not known."""
    if not tensor.packable:
        return "F32"
    canonical = next((known for known in (*LABELS, *ONE_FORMAT) if known.lower() == label.lower()), None)
    if canonical is None:
        raise UsageError(f"unknown format {label!r}", f"known: {', '.join(dict.fromkeys((*LABELS, *ONE_FORMAT)))}")
    name = _MIXES[canonical](tensor, num_layers, tied, gqa) if canonical in _MIXES else canonical
    return _fit(name, tensor)


def _fit(name: str, tensor: TensorSpec) -> str:
    block = getattr(get_format(name), "block_size", 1)
    if tensor.shape[-1] % block == 0:
        return name
    smaller = _SMALLER_BLOCKS.get(name, "F16")
    return smaller if tensor.shape[-1] % getattr(get_format(smaller), "block_size", 1) == 0 else "F16"


def _more_bits(layer: int, num_layers: int) -> bool:
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _is_head(tensor: TensorSpec, tied: bool) -> bool:
    return tensor.role == "head" or (tied and tensor.role == "embedding")


def _mix_k_m(base: str) -> Callable[[TensorSpec, int, bool, int], str]:
    def choose(tensor: TensorSpec, num_layers: int, tied: bool, _gqa: int) -> str:
        more = tensor.layer is not None and _more_bits(tensor.layer, num_layers)
        if _is_head(tensor, tied) or (more and ("v_proj" in tensor.name or "down_proj" in tensor.name)):
            return "Q6_K"
        return base

    return choose


def _mix_q3_k_m(tensor: TensorSpec, num_layers: int, tied: bool, _gqa: int) -> str:
    if _is_head(tensor, tied):
        return "Q6_K"
    layer = tensor.layer or 0
    if "v_proj" in tensor.name:
        return "Q5_K" if layer < 2 else "Q4_K"
    if "down_proj" in tensor.name:
        return "Q5_K" if layer < num_layers // 16 else ("Q4_K" if _more_bits(layer, num_layers) else "Q3_K")
    return "Q4_K" if "o_proj" in tensor.name else "Q3_K"


def _mix_q2_k(tensor: TensorSpec, _num_layers: int, tied: bool, gqa: int) -> str:
    if _is_head(tensor, tied):
        return "Q6_K"
    if "v_proj" in tensor.name:
        return "Q4_K" if gqa >= 4 else "Q3_K"
    return "Q3_K" if "down_proj" in tensor.name or "o_proj" in tensor.name else "Q2_K"


_MIXES = {"Q5_K_M": _mix_k_m("Q5_K"), "Q4_K_M": _mix_k_m("Q4_K"), "Q3_K_M": _mix_q3_k_m, "Q2_K": _mix_q2_k}
