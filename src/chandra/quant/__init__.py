"""Weight formats: byte layouts, pack and unpack references, and their registry."""

from __future__ import annotations

from chandra.errors import UnsupportedError
from chandra.quant.base import BlockFormat, Format, PackedWeight, Part
from chandra.quant.floats import BF16, F16, F32
from chandra.quant.int4 import Int4
from chandra.quant.int8 import Int8
from chandra.quant.iq4_nl import IQ4_NL
from chandra.quant.iq4_xs import IQ4_XS
from chandra.quant.mxfp4 import MXFP4
from chandra.quant.nf4 import NF4, NF4DQ
from chandra.quant.q2_k import Q2_K
from chandra.quant.q3_k import Q3_K
from chandra.quant.q4_0 import Q4_0
from chandra.quant.q4_1 import Q4_1
from chandra.quant.q4_k import Q4_K
from chandra.quant.q5_0 import Q5_0
from chandra.quant.q5_1 import Q5_1
from chandra.quant.q5_k import Q5_K
from chandra.quant.q6_k import Q6_K
from chandra.quant.q8_0 import Q8_0

__all__ = ["BlockFormat", "Format", "PackedWeight", "Part", "format_of_ggml_type", "formats", "get_format"]

_FORMATS: tuple[Format, ...] = (
    *(F32(), F16(), BF16()),
    *(Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0()),
    *(Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K()),
    *(IQ4_NL(), IQ4_XS(), MXFP4()),
    *(Int8(), Int4(32), Int4(64), Int4(128), NF4(), NF4DQ()),
)
_BY_NAME = {fmt.name.lower(): fmt for fmt in _FORMATS}
_BY_NAME["int4"] = _BY_NAME["int4-g128"]
_BY_GGML_TYPE = {fmt.ggml_type: fmt for fmt in _FORMATS if isinstance(fmt, BlockFormat)}
_UNSUPPORTED_GGML_TYPES = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"},
}


def formats() -> tuple[Format, ...]:
    """All formats, plain floats first."""
    return _FORMATS


def get_format(name: str) -> Format:
    """The format of this name, in upper or lower case; `int4` is `int4-g128`. Raises `UnsupportedError` for others."""
    found = _BY_NAME.get(name.lower())
    if found is None:
        raise UnsupportedError(f"unknown weight format {name!r}", f"formats: {', '.join(f.name for f in _FORMATS)}")
    return found


def format_of_ggml_type(type_id: int) -> BlockFormat:
    """The format of a GGML_TYPE_* number of a GGUF file. Raises `UnsupportedError` for the types without one."""
    found = _BY_GGML_TYPE.get(type_id)
    if found is None:
        raise UnsupportedError(
            f"GGUF tensor type {type_id} ({_UNSUPPORTED_GGML_TYPES.get(type_id, 'unknown')}) is not supported",
            f"use a file with the types {', '.join(f.name for f in _BY_GGML_TYPE.values())}",
        )
    return found
