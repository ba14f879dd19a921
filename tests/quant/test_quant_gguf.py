"""The GGUF formats against the reference implementation in the gguf package."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from chandra.quant import BlockFormat, formats

BLOCK_FORMATS = [fmt for fmt in formats() if isinstance(fmt, BlockFormat)]
by_name = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda fmt: fmt.name)


@by_name
def test_type_number_and_sizes(fmt: BlockFormat) -> None:
    ggml_type = GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == ggml_type
    assert (fmt.block_size, fmt.block_bytes) == GGML_QUANT_SIZES[ggml_type]


@by_name
def test_random_bytes_unpack_bit_for_bit(fmt: BlockFormat) -> None:
    data = np.random.default_rng(1).integers(0, 256, (300, 2 * fmt.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales: infinite, not a number
        expected = quants.dequantize(data, GGMLQuantizationType[fmt.name])
    unpacked = fmt.unpack({"data": torch.from_numpy(data)}, expected.shape).numpy()
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(unpacked), ~numbers)
    np.testing.assert_array_equal(unpacked[numbers].view(np.uint32), expected[numbers].view(np.uint32))
