"""What packing loses: error bounds, edge values, stability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.errors import UnsupportedError
from chandra.quant import Format, formats, get_format
from chandra.quant.bits import reciprocal
from chandra.quant.iq4_nl import LEVELS, nearest_level
from chandra.quant.search import fit_affine, fit_scale, importance

COLUMNS = 256  # fits every format

# name: (rms error on gaussian values relative to their rms, largest error relative to the largest value of a row)
ERRORS = {
    "F32": (0, 0),
    "F16": (0.0003, 2**-11),
    "BF16": (0.002, 2**-8),
    "Q4_0": (0.0865, 1 / 8 + 0.001),
    "Q4_1": (0.0786, 1 / 15 + 0.001),
    "Q5_0": (0.0430, 1 / 16 + 0.001),
    "Q5_1": (0.0381, 1 / 31 + 0.001),
    "Q8_0": (0.0054, 0.5 / 127 + 0.0005),
    "Q2_K": (0.2700, 0.5),
    "Q3_K": (0.1465, 0.3),
    "Q4_K": (0.0715, 0.12),
    "Q5_K": (0.0358, 0.06),
    "Q6_K": (0.0175, 0.04),
    "IQ4_NL": (0.0758, 0.17),
    "IQ4_XS": (0.0765, 0.19),
    "MXFP4": (0.1155, 0.251),
    "int8": (0.0087, 0.5 / 127 + 1e-6),
    "int4-g32": (0.0715, 0.16),
    "int4-g64": (0.0835, 0.16),
    "int4-g128": (0.0945, 0.16),
    "nf4": (0.0925, 0.153),
    "nf4-dq": (0.0930, 0.2),
}
each_format = pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)


def round_trip(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    return fmt.unpack(fmt.pack(weight), tuple(weight.shape))


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Rows of gaussian, heavy-tailed, one-sided, constant, sparse, two-valued or drawn values, of one magnitude."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = {
        "gaussian": lambda: rng.standard_normal(COLUMNS),
        "heavy": lambda: rng.standard_t(2, COLUMNS),
        "positive": lambda: rng.uniform(1, 2, COLUMNS),
        "negative": lambda: rng.uniform(-2, -1, COLUMNS),
        "constant": lambda: np.full(COLUMNS, rng.standard_normal()),
        "sparse": lambda: rng.standard_normal(COLUMNS) * (rng.random(COLUMNS) < 0.02),
        "signs": lambda: rng.choice([-1.0, 1.0], COLUMNS),
        "zeros": lambda: np.zeros(COLUMNS),
        "drawn": lambda: np.resize(draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=64)), COLUMNS),
    }
    rows = [kinds[kind]() for kind in draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4))]
    return torch.from_numpy(np.stack(rows).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-2, 2))))


@each_format
@given(weight=weights())
@settings(deadline=None, max_examples=60)
def test_errors_are_bounded(fmt: Format, weight: torch.Tensor) -> None:
    relative = ERRORS[fmt.name][1]
    largest = weight.abs().amax() if fmt.name == "nf4-dq" else weight.abs().amax(1, keepdim=True)
    error = (round_trip(fmt, weight) - weight).abs()
    coarse = 127 * 2.0**-25  # of a float16 scale that is subnormal, times the largest integer
    assert bool((error <= relative * largest + coarse).all()), float((error / largest).max())


@each_format
def test_gaussian_error(fmt: Format) -> None:
    weight = gaussian(64, 4096) * 0.02
    rms = float((round_trip(fmt, weight) - weight).square().mean().sqrt() / weight.square().mean().sqrt())
    bound = ERRORS[fmt.name][0]
    assert 0.9 * bound <= rms <= bound or fmt.name in ("F16", "BF16")


@each_format
def test_zeros_stay_zeros(fmt: Format) -> None:
    unpacked = round_trip(fmt, torch.zeros(3, COLUMNS))
    assert torch.equal(unpacked, torch.zeros(3, COLUMNS))


@each_format
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-9])
def test_tiny_values_stay_tiny(fmt: Format, magnitude: float) -> None:
    unpacked = round_trip(fmt, gaussian(3, COLUMNS) * magnitude)
    assert bool((unpacked.abs() <= max(8 * magnitude, 1e-5)).all())  # float16 scales may lose them, not blow them up


@each_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(fmt: Format, bad: float) -> None:
    weight = gaussian(5, COLUMNS)
    weight[3, 77] = bad
    if fmt.name in ("F32", "F16", "BF16"):
        torch.testing.assert_close(round_trip(fmt, weight)[3, 77], torch.tensor(bad), equal_nan=True)
    else:
        with pytest.raises(UnsupportedError, match="not a number"):
            fmt.pack(weight)


@each_format
def test_huge_values(fmt: Format) -> None:
    weight = gaussian(5, COLUMNS) * 1e30
    if fmt.name in ("F32", "BF16", "MXFP4", "int8", "nf4", "nf4-dq"):
        torch.testing.assert_close(round_trip(fmt, weight), weight, rtol=0, atol=1e30)
    else:
        with pytest.raises(UnsupportedError, match=f"too large for {fmt.name}"):
            fmt.pack(weight)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "MXFP4", "nf4"])
@given(weight=weights())
@settings(deadline=None, max_examples=30)
def test_packing_again_changes_nothing(name: str, weight: torch.Tensor) -> None:
    fmt = get_format(name)
    once = round_trip(fmt, weight)
    assert torch.equal(round_trip(fmt, once), once)


@each_format
def test_dtypes_and_strides(fmt: Format) -> None:
    """Any float dtype, and a view that is not contiguous, pack as their float32 copy does."""
    weight = gaussian(2 * COLUMNS, 12).to(torch.bfloat16)
    packed = fmt.pack(weight[:, ::3].t())
    expected = fmt.pack(weight[:, ::3].t().contiguous().to(torch.float32))
    assert all(torch.equal(packed[name], expected[name]) for name in expected)


@each_format
def test_chunks_do_not_show(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(7, COLUMNS)
    expected = fmt.pack(weight)
    monkeypatch.setattr("chandra.quant.base.CHUNK", 300)
    packed = fmt.pack(weight)
    assert all(torch.equal(packed[name], expected[name]) for name in expected)
    assert torch.equal(fmt.unpack(packed, (7, COLUMNS)), round_trip(fmt, weight))


@given(weight=weights(), top=st.sampled_from([3, 15, 31]))
@settings(deadline=None, max_examples=100)
def test_affine_search_beats_the_plain_scale(weight: torch.Tensor, top: int) -> None:
    groups = weight.reshape(-1, 32)

    def error(scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        q = ((groups + offset) * reciprocal(scale)).round().clamp(0, top)
        return (importance(groups) * (scale * q - offset - groups).square()).sum(1)

    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True)
    plain = error((high - low) / top, -low)
    found = error(*fit_affine(groups, top))
    assert bool((found <= plain * 1.001 + 1e-6 * groups.square().sum(1)).all())


@given(weight=weights(), name=st.sampled_from(["Q3_K", "Q6_K", "IQ4_NL"]))
@settings(deadline=None, max_examples=100)
def test_symmetric_search_beats_the_plain_scale(weight: torch.Tensor, name: str) -> None:
    groups = weight.reshape(-1, 16)
    extreme = {"Q3_K": -4, "Q6_K": -32, "IQ4_NL": LEVELS[0]}[name]

    def rounding(values: torch.Tensor) -> torch.Tensor:
        return nearest_level(values) if name == "IQ4_NL" else values.round().clamp(extreme, -extreme - 1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        level = rounding(groups * reciprocal(scale))
        return (importance(groups) * (scale * level - groups).square()).sum(1)

    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    found = error(fit_scale(groups, rounding, extreme, steps=range(-1, 2)))
    assert bool((found <= error(largest / extreme) * 1.001 + 1e-6 * groups.square().sum(1)).all())


def test_nearest_level_of_ties_and_extremes() -> None:
    values = torch.arange(-700, 700) / 4
    distance = (values[:, None] - torch.tensor(LEVELS)).abs()
    assert torch.equal((values - nearest_level(values)).abs(), distance.amin(1))
