"""Rows taken from, joined into and converted between packed weights, without unpacking them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import packed

from chandra.errors import UnsupportedError
from chandra.models.transforms import concatenate, convert, floats, take_rows
from chandra.quant import PackedWeight, formats, get_format

BY_ROWS = [f.name for f in formats() if not f.name.startswith("nf4")]


def weight(form: str, shape: tuple[int, ...]) -> PackedWeight:
    torch.manual_seed(0)
    return PackedWeight.pack(get_format(form), torch.randn(shape))


@pytest.mark.parametrize("form", BY_ROWS)
@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, 24), min_size=2, max_size=6), experts=st.integers(0, 3))
def test_rows_taken_are_the_rows(form: str, cuts: list[int], experts: int) -> None:
    whole = weight(form, (*((experts,) if experts else ()), 24, 256))
    cuts = sorted(cuts)
    ranges = tuple((a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False) if a < b)
    taken = take_rows(whole, ranges)
    rows = [r for a, b in ranges for r in range(a, b)] or list(range(24))
    torch.testing.assert_close(taken.unpack(), whole.unpack()[..., rows, :], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["F32", "Q4_K", "int4-g64", "int8", "nf4"])
def test_a_run_of_rows_is_a_view(form: str) -> None:
    whole = weight(form, (256, 256))
    taken = take_rows(whole, ((64, 192),))
    for name, part in taken.parts.items():
        assert np.shares_memory(part, whole.parts[name])
    torch.testing.assert_close(taken.unpack(), whole.unpack()[64:192], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["nf4", "nf4-dq"])
def test_formats_that_ignore_rows_are_cut_at_their_blocks_only(form: str) -> None:
    whole = weight(form, (256, 256))
    torch.testing.assert_close(take_rows(whole, ((128, 256),)).unpack(), whole.unpack()[128:], rtol=0, atol=0)
    with pytest.raises(UnsupportedError, match="blocks"):
        take_rows(whole, ((32, 128),))


@pytest.mark.parametrize("form", BY_ROWS)
def test_joined_experts_are_the_experts(form: str) -> None:
    parts = [weight(form, (8, 256)), weight(form, (8, 256))]
    joined = concatenate(parts, (2, 8, 256))
    torch.testing.assert_close(joined.unpack(), torch.stack([p.unpack() for p in parts]), rtol=0, atol=0)


def test_what_cannot_be_joined_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="joined"):
        concatenate([weight("nf4-dq", (64, 256)), weight("nf4-dq", (64, 256))], (2, 64, 256))
    with pytest.raises(UnsupportedError, match="joined"):
        concatenate([weight("Q4_0", (8, 256)), weight("IQ4_NL", (8, 256))], (2, 8, 256))


@pytest.mark.parametrize("target", ["Q8_0", "Q4_K", "int8", "int4-g32", "nf4", "nf4-dq", "BF16"])
def test_conversion_in_pieces_is_conversion_at_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weight("F16", (40, 512))
    monkeypatch.setattr("chandra.models.transforms.CONVERT", 7 * 512)
    pieces = convert(whole, get_format(target))
    once = PackedWeight.pack(get_format(target), whole.unpack())
    assert pieces.shape == once.shape
    for name, part in once.parts.items():
        np.testing.assert_array_equal(pieces.parts[name], part)


def test_floats_of_any_format() -> None:
    values = np.array([0.5, -1.25, 3.0, 0.0] * 8, np.float32)
    for form in ("F32", "F16", "BF16"):
        np.testing.assert_array_equal(floats(packed(values, form), "x"), values)
    np.testing.assert_allclose(floats(packed(values, "Q8_0"), "x"), values, atol=0.02)
