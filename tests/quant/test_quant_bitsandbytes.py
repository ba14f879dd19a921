"""nf4, nf4-dq and int8 against bitsandbytes, which defines them."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.quant import get_format
from chandra.quant.nf4 import LEVELS, dynamic_map

SHAPES = [(1, 64), (7, 64), (128, 256), (5, 100), (3, 2, 66), (300, 448)]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_tables() -> None:
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(torch.tensor(LEVELS), bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_packs_and_unpacks_bit_for_bit(shape: tuple[int, ...]) -> None:
    fmt, weight = get_format("nf4"), gaussian(*shape)
    weight.view(-1)[:64] = 0
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = fmt.pack(weight)
    assert torch.equal(packed["data"], data.reshape(-1))
    assert torch.equal(packed["absmax"], state.absmax)
    assert torch.equal(fmt.unpack(packed, shape), bnb.dequantize_4bit(data, state))


@given(rows=st.integers(1, 9), columns=st.integers(1, 200), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_nf4_packs_odd_sizes_bit_for_bit(rows: int, columns: int, seed: int) -> None:
    weight = gaussian(rows, columns, seed=seed)
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = get_format("nf4").pack(weight)
    assert torch.equal(packed["data"], data.reshape(-1))
    assert torch.equal(packed["absmax"], state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_dq_unpacks_bit_for_bit(shape: tuple[int, ...]) -> None:
    weight = gaussian(*shape)
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = {
        "data": data.reshape(-1),
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.reshape(1),
    }
    assert torch.equal(get_format("nf4-dq").unpack(parts, shape), bnb.dequantize_4bit(data, state))


def test_nf4_dq_packs_as_bitsandbytes_or_nearer() -> None:
    """The CPU kernel of bitsandbytes misses the nearest level of about one absmax in 600; its CUDA kernel does not."""
    weight = gaussian(500, 1024)
    fmt = get_format("nf4-dq")
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = fmt.pack(weight)
    assert torch.equal(packed["data"], data.reshape(-1))
    assert torch.equal(packed["nested_absmax"], state.state2.absmax)
    assert torch.equal(packed["nested_offset"], state.offset.reshape(1))
    assert (packed["absmax"] != state.absmax).float().mean() < 0.005
    absmax = weight.reshape(-1, 64).abs().amax(1)
    parts = {**packed, "absmax": state.absmax}
    ours, theirs = ((fmt.absmax(p, 0, len(absmax)) - absmax).abs() for p in (packed, parts))
    assert bool((ours <= theirs + 1e-6).all())


def test_int8_packs_bit_for_bit() -> None:
    fmt, weight = get_format("int8"), gaussian(64, 250)
    data, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    packed = fmt.pack(weight)
    assert torch.equal(packed["data"], data)
    assert torch.equal(packed["scales"], absmax / 127)
    torch.testing.assert_close(
        fmt.unpack(packed, (64, 250)), bnb.int8_vectorwise_dequant(data, absmax), rtol=3e-7, atol=0
    )
