"""The C++ products against float64, for every format, instruction set and batch size."""

from __future__ import annotations

import functools
import itertools
import mmap
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chandra.backends.cpu.backend import CpuBackend
from chandra.memory.device import Device
from chandra.ops.contracts import Linear, Norm, Weight
from chandra.quant import Format, PackedWeight, formats, get_format
from chandra.quant.base import BlockFormat

_cpu = pytest.importorskip("chandra.backends.cpu._cpu")

FLOATS = ("F32", "F16", "BF16", "nf4", "nf4-dq")
SEED = secrets.randbits(32)
BLOCKED = [fmt for fmt in formats() if isinstance(fmt, BlockFormat)]
BATCHES = (1, 2, 3, 5, 8, 16, 17, 33, 130)


def available(isa: str) -> bool:
    try:
        _cpu.set_isa(isa)
    except ValueError:
        return False
    _cpu.set_isa("auto")
    return True


ISAS = [isa for isa in ("portable", "avx2", "avx512") if available(isa)]


@pytest.fixture(params=ISAS)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    _cpu.set_isa(request.param)
    yield
    _cpu.set_isa("auto")


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    print(f"seed {SEED}")
    return np.random.default_rng(SEED)


def block(fmt: Format) -> int:
    if fmt.name.startswith("int4-g"):
        return int(fmt.name[6:])
    return getattr(fmt, "block_size", 1)


@functools.cache
def packed(name: str, shape: tuple[int, ...]) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """The parts of a weight with outliers, and its exact values in float64."""
    rng = np.random.default_rng(SEED)
    values = rng.standard_normal(shape, np.float32) * rng.uniform(0.01, 0.1, (*shape[:-1], 1)).astype(np.float32)
    values *= np.where(rng.random(shape) < 0.01, 4, 1)
    parts = get_format(name).pack(torch.from_numpy(values.astype(np.float32)))
    return {name: part.numpy() for name, part in parts.items()}, get_format(name).unpack(parts, shape).double().numpy()


def make(fmt: Format, shape: tuple[int, ...], repack: bool = True) -> tuple[Weight, np.ndarray[Any, Any]]:
    parts, exact = packed(fmt.name, shape)
    handle = _cpu.Weight(fmt.name, shape, parts, repack)
    return Weight(fmt, shape, handle.nbytes, handle), exact


def quantized(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x as the kernels see it: int8 in blocks of 32 with a float32 scale."""
    columns = x.shape[-1]
    blocks = np.pad(x, ((0, 0), (0, -columns % 32))).reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(2, keepdims=True)
    q = np.rint(blocks * np.where(amax > 1e-36, np.float32(127) / np.maximum(amax, 1e-36), np.float32(0)))
    return (q.astype(np.float64) * (amax / np.float32(127))).reshape(len(x), -1)[:, :columns]


def product(weight: Weight, x: np.ndarray[Any, Any], bias: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    out = np.full((len(x), weight.shape[0]), np.nan, np.float32)
    _cpu.norm_linear(x, None, (Linear(weight, bias),), (out,))
    return out


def shapes(fmt: Format) -> list[tuple[int, int]]:
    unit = block(fmt)
    columns = (unit, 3 * unit, 5 * unit) if unit >= 128 else (32, 96, 576)
    if unit == 64:
        columns = (64, 192, 576)
    if unit == 1:
        columns = (1, 37, 200)
    return list(zip((1, 16, 37), columns, strict=True))


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_products_match_float64(fmt: Format, rng: np.random.Generator) -> None:
    for shape, repack in itertools.product(shapes(fmt), (True, False)):
        weight, exact = make(fmt, shape, repack)
        for n in BATCHES:
            x = rng.standard_normal((n, shape[1]), np.float32)
            out = product(weight, x)
            size = np.abs(x).astype(np.float64) @ np.abs(exact).T
            if fmt.name in FLOATS:
                assert np.all(np.abs(out - x.astype(np.float64) @ exact.T) <= 2e-6 * size + 1e-12)
            else:
                # with minimums, q * scale and the minimum may be larger than their sum
                assert np.all(np.abs(out - quantized(x) @ exact.T) <= 1e-5 * size + 1e-6)
                amax = np.abs(x).max(1, keepdims=True)
                bound = amax / 254 * np.abs(exact).sum(1) * 1.01
                assert np.all(np.abs(out - x.astype(np.float64) @ exact.T) <= bound + 1e-5 * size + 1e-6)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_rows_do_not_depend_on_the_batch(fmt: Format, rng: np.random.Generator) -> None:
    shape = shapes(fmt)[2]
    weight, _ = make(fmt, shape)
    in_place, _ = make(fmt, shape, repack=False)
    x = rng.standard_normal((130, shape[1]), np.float32)
    for tested in (weight, in_place):
        whole = product(tested, x)
        for n in (1, 2, 3, 5, 7, 17):
            start = int(rng.integers(0, 130 - n))
            assert np.array_equal(product(tested, np.ascontiguousarray(x[start : start + n])), whole[start : start + n])
    threads = _cpu.threads()
    try:
        _cpu.set_threads(1)
        alone = product(weight, x)
        _cpu.set_threads(3)
        assert np.array_equal(product(weight, x), alone)
    finally:
        _cpu.set_threads(threads)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_repacked_and_in_place_agree(fmt: Format, rng: np.random.Generator) -> None:
    shape = shapes(fmt)[2]
    values = torch.from_numpy(rng.standard_normal(shape, np.float32))
    parts = {name: part.numpy() for name, part in fmt.pack(values).items()}
    x = rng.standard_normal((9, shape[1]), np.float32)
    outs = []
    for repack in (True, False):
        handle = _cpu.Weight(fmt.name, shape, parts, repack)
        assert handle.in_place == (not repack or (fmt.name.startswith("nf4") and shape[1] % 64 != 0))
        stored = sum(part.nbytes for part in parts.values())
        assert handle.nbytes == (stored if handle.in_place else _cpu.repacked_nbytes(fmt.name, shape))
        outs.append(product(Weight(fmt, shape, handle.nbytes, handle), x))
    assert np.array_equal(*outs)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_embed_returns_the_rows(fmt: Format, repack: bool, rng: np.random.Generator) -> None:
    shape = (37, shapes(fmt)[2][1])
    table, exact = make(fmt, shape, repack)
    ids = rng.integers(0, 37, 21).astype(np.int32)
    out = np.empty((21, shape[1]), np.float32)
    _cpu.embed(ids, table.handle, 1.5, out)
    np.testing.assert_allclose(out, exact[ids] * 1.5, rtol=2e-6, atol=1e-6)
    for bad in (-1, 37):
        with pytest.raises(IndexError, match="token id"):
            _cpu.embed(np.array([bad], np.int32), table.handle, 1.0, out[:1])


@pytest.mark.usefixtures("_isa")
def test_blocks_at_odd_addresses(rng: np.random.Generator) -> None:
    for name, columns in (("Q4_0", 96), ("Q5_0", 96), ("Q6_K", 512), ("F32", 33), ("MXFP4", 96)):
        fmt = get_format(name)
        packed = fmt.pack(torch.from_numpy(rng.standard_normal((17, columns), np.float32)))
        data = packed["data"].numpy()
        buffer = np.empty(data.nbytes + 1, np.uint8)
        buffer[1:] = data.reshape(-1)
        shifted = buffer[1:].reshape(data.shape)
        x = rng.standard_normal((3, columns), np.float32)
        outs = [
            product(Weight(fmt, (17, columns), 0, _cpu.Weight(name, (17, columns), {"data": part}, repack)), x)
            for part in (data, shifted)
            for repack in (True, False)
        ]
        assert all(np.array_equal(out, outs[0]) for out in outs)


@pytest.mark.usefixtures("_isa")
def test_zeros_and_huge_activations() -> None:
    weight, exact = make(get_format("Q8_0"), (32, 64))
    x = np.zeros((2, 64), np.float32)
    x[1] = 1e30
    out = product(weight, x)
    assert np.all(out[0] == 0)
    np.testing.assert_allclose(out[1], x[1].astype(np.float64) @ exact.T, rtol=1e-4, atol=1e24)


@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(bad: float, rng: np.random.Generator) -> None:
    for name in ("Q4_0", "Q4_1", "Q6_K", "F32"):
        weight, _ = make(get_format(name), (37, 512))
        x = rng.standard_normal((3, 512), np.float32)
        clean = product(weight, x)
        x[1, rng.integers(512)] = bad
        out = product(weight, x)
        assert not np.isfinite(out[1]).any()
        assert np.array_equal(out[::2], clean[::2])


def test_parts_that_do_not_fit_are_refused() -> None:
    data = np.zeros((4, 18), np.uint8)
    for name, shape, parts, message in (
        ("Q4_0", (4, 33), {"data": data}, "multiple"),
        ("Q4_0", (5, 32), {"data": data}, "wrong size"),
        ("Q4_0", (4, 32), {}, "no part data"),
        ("Q4_0", (32,), {"data": data}, "dimensions"),
        ("Q9_9", (4, 32), {"data": data}, "no kernel"),
        ("int8", (4, 18), {"data": data.view(np.int8)}, "no part scales"),
    ):
        with pytest.raises(ValueError, match=message):
            _cpu.Weight(name, shape, parts)


def test_arrays_that_do_not_fit_are_refused() -> None:
    weight, _ = make(get_format("Q4_0"), (16, 32))
    linear = Linear(weight)
    norm = Norm(np.ones(31, np.float32), 1e-6)
    good = np.zeros((2, 32), np.float32)
    for x, use, out in (
        (np.zeros((2, 31), np.float32), None, np.empty((2, 16), np.float32)),
        (good, None, np.empty((2, 15), np.float32)),
        (good, None, np.empty((2, 16), np.float64)),
        (good, norm, np.empty((2, 16), np.float32)),
        (good, None, np.empty((4, 16), np.float32)[::2]),
    ):
        with pytest.raises(ValueError):  # noqa: PT011 the messages differ
            _cpu.norm_linear(x, use, (linear,), (out,))


@pytest.mark.parametrize("fmt", BLOCKED, ids=lambda fmt: fmt.name)
def test_a_weight_in_a_file_is_repacked_before_its_second_product(fmt: Format, tmp_path: Path) -> None:
    """Two threads compute with it meanwhile; the pages of the file leave the process."""
    shape = (37 * 16 + 5, shapes(fmt)[2][1])
    parts, _ = packed(fmt.name, shape)
    path = tmp_path / "weights"
    path.write_bytes(bytes(24) + parts["data"].tobytes())
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    mapped = np.frombuffer(mapping, np.uint8, offset=24).reshape(parts["data"].shape)
    device = Device("cpu", "cpu", 1 << 30)
    weight = CpuBackend(device).load_weight(PackedWeight(fmt, shape, {"data": mapped}))
    assert weight.handle.in_place
    assert weight.nbytes == _cpu.repacked_nbytes(fmt.name, shape)
    x = np.random.default_rng(SEED).standard_normal((3, shape[1]), np.float32)
    right = product(make(fmt, shape)[0], x)
    assert np.array_equal(product(weight, x), right)
    assert weight.handle.in_place
    with ThreadPoolExecutor(2) as pool:
        assert all(np.array_equal(out, right) for out in pool.map(lambda _: product(weight, x), range(8)))
    assert not weight.handle.in_place
    assert weight.nbytes == _cpu.repacked_nbytes(fmt.name, shape)
    assert np.array_equal(mapped, parts["data"])  # read again
    copied = CpuBackend(device).load_weight(PackedWeight(fmt, shape, {"data": mapped.copy()}))
    assert not copied.handle.in_place
    table = CpuBackend(device).load_weight(PackedWeight(fmt, shape, {"data": mapped}), lookup=True)
    ids = np.arange(300, dtype=np.int32)
    rows = [np.empty((300, shape[1]), np.float32) for _ in range(3)]
    for out in rows[:2]:  # the pages are dropped in between
        _cpu.embed(ids, table.handle, 1.0, out)
    _cpu.embed(ids, weight.handle, 1.0, rows[2])
    assert table.handle.in_place
    assert np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[1], rows[2])
