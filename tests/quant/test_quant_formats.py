"""The registry, sizes, row slices, host weights, and the table in the documentation."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chandra.errors import UnsupportedError
from chandra.quant import BlockFormat, Format, PackedWeight, formats, get_format

BITS = {
    **{"F32": 32, "F16": 16, "BF16": 16, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625},
    **{"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25, "MXFP4": 4.25},
    **{"int8": 8.002, "int4-g32": 5, "int4-g64": 4.5, "int4-g128": 4.25, "nf4": 4.5, "nf4-dq": 4.127},
}
each_format = pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_bits_per_weight() -> None:
    assert {fmt.name: round(fmt.bits_per_weight, 4) for fmt in formats()} == pytest.approx(BITS, abs=6e-4)


def test_names() -> None:
    for fmt in formats():
        assert get_format(fmt.name) is get_format(fmt.name.lower()) is get_format(fmt.name.upper()) is fmt
    assert get_format("int4").name == "int4-g128"


@pytest.mark.parametrize("name", ["", "q9_k", "IQ2_XXS"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown weight format") as error:
        get_format(name)
    assert all(fmt.name in error.value.hint for fmt in formats())


@each_format
@pytest.mark.parametrize("shape", [(256,), (3, 512), (2, 5, 256)])
def test_parts_describe_what_pack_returns(fmt: Format, shape: tuple[int, ...]) -> None:
    packed = PackedWeight.pack(fmt, gaussian(*shape))
    assert [(name, part.shape, part.dtype.name) for name, part in packed.parts.items()] == [
        (part.name, part.shape, part.dtype) for part in fmt.parts(shape)
    ]
    assert packed.nbytes == fmt.nbytes(shape)
    assert packed.unpack().shape == shape


@each_format
def test_rows_that_do_not_fit(fmt: Format) -> None:
    size = fmt.block_size if isinstance(fmt, BlockFormat) else getattr(fmt, "group_size", 1)
    if size == 1:
        fmt.pack(gaussian(3, 33))
        return
    for call in (lambda: fmt.parts((4, size + 1)), lambda: fmt.pack(gaussian(4, size // 2))):
        with pytest.raises(UnsupportedError, match=f"{fmt.name} packs {size} values at once; a row of"):
            call()


@each_format
@pytest.mark.parametrize("shape", [(9, 256), (3, 4, 256)])
def test_row_slices(fmt: Format, shape: tuple[int, ...]) -> None:
    """A slice is those rows of the whole, across experts too, bit for bit."""
    parts = fmt.pack(gaussian(*shape))
    whole = fmt.unpack(parts, shape).reshape(-1, shape[-1])
    for start, stop in [(0, 1), (2, 7), (3, 3), (5, 9), (len(whole) - 1, len(whole))]:
        assert torch.equal(fmt.unpack_rows(parts, shape, start, stop), whole[start:stop])


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("shape", [(9, 33), (2, 3, 50)])
def test_row_slices_that_start_within_a_block(name: str, shape: tuple[int, ...]) -> None:
    fmt = get_format(name)
    parts = fmt.pack(gaussian(*shape))
    rows = math.prod(shape[:-1])
    whole = fmt.unpack_rows(parts, shape, 0, rows)
    for start in range(rows):
        for stop in range(start, rows + 1):
            assert torch.equal(fmt.unpack_rows(parts, shape, start, stop), whole[start:stop])


@each_format
def test_only_the_asked_rows_are_touched(fmt: Format) -> None:
    """Bytes of other rows may be anything (not yet read, or damaged)."""
    shape = (8, 256)
    parts = fmt.pack(gaussian(*shape))
    expected = fmt.unpack_rows(parts, shape, 2, 5)
    for part in parts.values():
        if part.numel() >= 8:  # not what is shared by the whole tensor
            rows = part.view(8, -1).view(torch.uint8)
            rows[:2], rows[5:] = 255, 255
    assert torch.equal(fmt.unpack_rows(parts, shape, 2, 5), expected)


def test_read_only_memory() -> None:
    weight = gaussian(4, 256)
    data = get_format("Q8_0").pack(weight)["data"].numpy().copy()
    data.flags.writeable = False
    torch.testing.assert_close(
        PackedWeight(get_format("Q8_0"), (4, 256), {"data": data}).unpack(), weight, atol=0.02, rtol=0
    )


def test_bf16_on_the_host() -> None:
    """The bytes of a BF16 weight are those of its uint16 words."""
    weight = gaussian(4, 8)
    packed = PackedWeight.pack(get_format("BF16"), weight)
    np.testing.assert_array_equal(
        packed.parts["data"].view(np.uint16), weight.to(torch.bfloat16).view(torch.uint16).numpy()
    )


def test_the_registry_does_not_import_torch() -> None:
    code = (
        "import sys; from chandra.quant import formats, get_format, format_of_ggml_type;"
        "[(f.nbytes((4, 1024)), f.bits_per_weight) for f in formats()]; format_of_ggml_type(12);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documentation_lists_every_format() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]
    assert [row[0] for row in rows] == [fmt.name for fmt in formats()]
    for fmt, (_, block, nbytes, bits, _) in zip(formats(), rows, strict=True):
        if isinstance(fmt, BlockFormat):
            assert (block, nbytes) == (str(fmt.block_size), str(fmt.block_bytes))
        assert bits == f"{fmt.bits_per_weight:.4f}".rstrip("0").rstrip(".")
