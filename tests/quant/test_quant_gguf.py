"""The GGUF formats against the reference implementation in the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.errors import UnsupportedError
from chandra.quant import BlockFormat, format_of_ggml_type, formats, get_format

BLOCK_FORMATS = [fmt for fmt in formats() if isinstance(fmt, BlockFormat)]
each_format = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda fmt: fmt.name)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bit for bit, where any NaN equals any other."""
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(~np.isnan(actual), numbers)
    np.testing.assert_array_equal(actual[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@each_format
def test_type_number_and_sizes(fmt: BlockFormat) -> None:
    ggml_type = GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == ggml_type
    assert (fmt.block_size, fmt.block_bytes) == GGML_QUANT_SIZES[ggml_type]
    assert format_of_ggml_type(ggml_type) is fmt


@each_format
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_random_bytes_unpack_bit_for_bit(fmt: BlockFormat, seed: int, rows: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, 3 * fmt.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales: infinite, not a number
        expected = quants.dequantize(data, GGMLQuantizationType[fmt.name])
    assert_same_bits(fmt.unpack({"data": torch.from_numpy(data)}, expected.shape).numpy(), expected)


@each_format
def test_packed_weights_unpack_bit_for_bit(fmt: BlockFormat) -> None:
    weight = np.random.default_rng(2).standard_normal((100, 512), dtype=np.float32)
    data = fmt.pack(torch.from_numpy(weight))["data"]
    expected = quants.dequantize(data.numpy(), GGMLQuantizationType[fmt.name])
    assert_same_bits(fmt.unpack({"data": data}, weight.shape).numpy(), expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-12, 3), coarse=st.booleans())
@settings(deadline=None, max_examples=25)
def test_pack_is_the_reference_packing(name: str, seed: int, exponent: int, coarse: bool) -> None:
    weight = np.random.default_rng(seed).standard_normal((33, 160), dtype=np.float32)
    if coarse:  # many equal values and ties, some blocks of zeros
        weight = np.round(weight * 2) / 2
        weight[::7] = 0
    weight *= np.float32(2.0**exponent)
    expected = quants.quantize(weight, GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(get_format(name).pack(torch.from_numpy(weight))["data"].numpy(), expected)


@pytest.mark.parametrize("ggml_type", set(GGMLQuantizationType) - {fmt.ggml_type for fmt in BLOCK_FORMATS})
def test_other_types_are_named(ggml_type: GGMLQuantizationType) -> None:
    with pytest.raises(UnsupportedError, match=rf"{ggml_type.value} \({ggml_type.name}\)") as error:
        format_of_ggml_type(ggml_type)
    assert "Q4_K" in error.value.hint


def test_type_numbers_out_of_range() -> None:
    for type_id in (-1, 12345):
        with pytest.raises(UnsupportedError, match=f"{type_id} .unknown"):
            format_of_ggml_type(type_id)
