"""The CPU attention kernel against float64, and its promise that company changes no bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_reference import Case, random_case, reference

from chandra.backends.cpu import _cpu
from chandra.backends.cpu.backend import CpuBackend
from chandra.errors import UsageError
from chandra.memory.device import Device
from chandra.ops.contracts import AttentionParams, KVTables, Norm, RopeParams

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def backend(request: pytest.FixtureRequest) -> Iterator[CpuBackend]:
    try:
        yield CpuBackend(Device("cpu", "cpu", 1 << 30), isa=request.param)
    except UsageError:
        pytest.skip(f"this CPU has no {request.param}")
    finally:
        _cpu.set_isa("auto")


def run(backend: CpuBackend, case: Case, parts: list[tuple[int, int, int]]) -> Any:
    batch, tables, q, k, v = case.batch(parts)
    out = np.full_like(q, np.nan)
    backend.attention(q.copy(), k.copy(), v, batch, case.params, case.cache, tables, out)
    return out


def rope(dim: int, interleaved: bool = False, scale: float = 1.0) -> RopeParams:
    return RopeParams((10000.0 ** -(np.arange(dim // 2) * 2 / dim)).astype(np.float32), scale, interleaved)


def params(heads: int, kv_heads: int, d: int, **more: Any) -> AttentionParams:
    return AttentionParams(heads, kv_heads, d, d**-0.5, **more)


def norm(rng: np.random.Generator, width: int, kind: Any = "rms") -> Norm:
    bias = rng.standard_normal(width, np.float32) if kind == "layer" else None
    return Norm(rng.standard_normal(width, np.float32) + 1, 1e-5, kind, bias)


@pytest.mark.parametrize("d", [32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_prefill_chunks_and_decode_match_float64(backend: CpuBackend, d: int, group: int) -> None:
    rng = np.random.default_rng(d + group)
    case = random_case(rng, params(2 * group, 2, d, rope=rope(d)), [1, 37, 150, 300])
    wanted = [reference(case, s) for s in range(4)]
    run(backend, case, [(1, 0, 20), (2, 0, 149)])
    got = run(backend, case, [(3, 0, 300), (0, 0, 1), (2, 149, 150), (1, 20, 37)])
    np.testing.assert_allclose(
        got, np.concatenate([wanted[3], wanted[0], wanted[2][149:], wanted[1][20:]]), rtol=0, atol=4e-6
    )


@pytest.mark.parametrize(
    "more",
    [
        {"window": 1},
        {"window": 100},
        {"window": 128, "softcap": 20.0},
        {"softcap": 5.0},
        {"rope": rope(64, interleaved=True)},
        {"rope": rope(32, scale=1.3), "window": 33},
        {"rope": rope(24, interleaved=True, scale=0.7)},
    ],
)
def test_windows_caps_and_rope_forms(backend: CpuBackend, more: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    case = random_case(rng, params(6, 2, 64, **more), [400, 290])
    wanted = [reference(case, s) for s in range(2)]
    for begin, end in [(0, 130), (130, 131), (131, 133), (133, 289)]:
        got = run(backend, case, [(0, begin, end), (1, begin, end)])
        np.testing.assert_allclose(got, np.concatenate([w[begin:end] for w in wanted]), rtol=0, atol=4e-6)
    got = run(backend, case, [(1, 289, 290), (0, 289, 400)])
    np.testing.assert_allclose(got, np.concatenate([wanted[1][289:], wanted[0][289:]]), rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("whole", [False, True])
def test_head_norms(backend: CpuBackend, kind: str, whole: bool) -> None:
    rng = np.random.default_rng(6)
    d, heads, kv_heads = 40, 4, 2
    widths = (heads * d, kv_heads * d) if whole else (d, d)
    case = random_case(
        rng, params(heads, kv_heads, d, q_norm=norm(rng, widths[0], kind), k_norm=norm(rng, widths[1], kind)), [50]
    )
    np.testing.assert_allclose(run(backend, case, [(0, 0, 50)]), reference(case, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kv_type", "bound"), [("f32", 4e-6), ("f16", 2e-3), ("bf16", 1.5e-2), ("q8_0", 2.5e-2), ("q4_0", 0.35)]
)
@pytest.mark.parametrize("d", [64, 96])
def test_cache_types_stay_within_their_error(backend: CpuBackend, kv_type: str, bound: float, d: int) -> None:
    rng = np.random.default_rng(7)
    case = random_case(rng, params(6, 2, d, rope=rope(d)), [260, 40], kv_type)
    wanted = [reference(case, s) for s in range(2)]
    run(backend, case, [(0, 0, 259)])
    got = run(backend, case, [(0, 259, 260), (1, 0, 40)])
    np.testing.assert_allclose(got, np.concatenate([wanted[0][259:], wanted[1]]), rtol=0, atol=bound)


def test_long_context(backend: CpuBackend) -> None:
    case = random_case(np.random.default_rng(8), params(3, 1, 64, rope=rope(64)), [2600], block_size=32)
    wanted = reference(case, 0, first=2500)
    np.testing.assert_allclose(run(backend, case, [(0, 0, 2599)])[2500:], wanted[:-1], rtol=0, atol=4e-6)
    np.testing.assert_allclose(run(backend, case, [(0, 2599, 2600)]), wanted[-1:], rtol=0, atol=4e-6)


@pytest.mark.parametrize("block_size", [5, 8, 16, 64])
def test_any_block_size(backend: CpuBackend, block_size: int) -> None:
    case = random_case(np.random.default_rng(9), params(4, 2, 32), [150], block_size=block_size)
    wanted = reference(case, 0)
    np.testing.assert_allclose(run(backend, case, [(0, 0, 149)]), wanted[:149], rtol=0, atol=4e-6)
    np.testing.assert_allclose(run(backend, case, [(0, 149, 150)]), wanted[149:], rtol=0, atol=4e-6)


@pytest.mark.parametrize(
    ("kv_type", "heads", "d", "window"),
    [
        *(("f16", 3, 64, None), ("f16", 1, 128, 200), ("f16", 8, 32, None), ("f16", 4, 256, 1100)),
        *(("f32", 3, 64, 200), ("bf16", 5, 32, 1100), ("q8_0", 3, 64, None), ("q4_0", 3, 64, 1100)),
        *(("f32", 3, 40, None), ("bf16", 2, 80, 130)),
    ],
)
def test_company_changes_no_bit(backend: CpuBackend, kv_type: str, heads: int, d: int, window: int | None) -> None:
    rng = np.random.default_rng(10)
    case = random_case(rng, params(2 * heads, 2, d, rope=rope(d), window=window), [1300, 90, 700], kv_type)
    whole = run(backend, case, [(0, 0, 1300)])
    chunked = [run(backend, case, [(0, b, e)]) for b, e in [(0, 7), (7, 500), (500, 501), (501, 1290)]]
    chunked += [run(backend, case, [(0, p, p + 1)]) for p in range(1290, 1297)]
    chunked += [run(backend, case, [(0, 1297, 1299), (1, 0, 89), (2, 0, 699)])[:2]]
    chunked += [run(backend, case, [(2, 699, 700), (0, 1299, 1300), (1, 89, 90)])[1:2]]
    assert np.array_equal(np.concatenate(chunked), whole)
    try:
        _cpu.set_threads(1 if _cpu.threads() > 1 else 2)
        assert np.array_equal(run(backend, case, [(0, 0, 1300)]), whole)
        assert np.array_equal(run(backend, case, [(0, 1299, 1300)]), whole[1299:])
    finally:
        _cpu.set_threads(0)


def test_far_positions_are_exact(backend: CpuBackend) -> None:
    """Only the difference of positions counts: a million tokens further on, the same scores."""
    d, far = 64, 1_000_000
    case = random_case(np.random.default_rng(11), params(2, 2, d, rope=rope(d)), [20])
    base = run(backend, case, [(0, 0, 20)])
    out = np.empty_like(base)
    for rows, window in [((0, 19), 1), ((19, 20), 20)]:  # what lies before `far` stays out of sight
        batch, tables, q, k, v = case.batch([(0, *rows)])
        shifted = replace(batch, positions=batch.positions + far, context_lens=batch.context_lens + far)
        table = np.pad(tables.block_table, ((0, 0), (far // 16, 0)), constant_values=-1)
        windowed = replace(case.params, window=window)
        backend.attention(q, k, v, shifted, windowed, case.cache, KVTables(table, tables.slots), out[slice(*rows)])
    np.testing.assert_allclose(out[19], base[19], rtol=0, atol=4e-6)


def test_wrong_arguments_are_refused(backend: CpuBackend) -> None:
    case = random_case(np.random.default_rng(12), params(4, 2, 32), [20])
    batch, tables, q, k, v = case.batch([(0, 0, 20)])
    out = np.empty_like(q)

    def attend(**changes: Any) -> None:
        a = {"q": q, "k": k, "v": v, "batch": batch, "cache": case.cache, "tables": tables, "out": out, **changes}
        backend.attention(a["q"], a["k"], a["v"], a["batch"], case.params, a["cache"], a["tables"], a["out"])

    with pytest.raises(ValueError, match="wrong shape"):
        attend(q=q[:, 1:])
    with pytest.raises(ValueError, match="wrong dtype"):
        attend(out=out.astype(np.float64))
    with pytest.raises(IndexError, match="outside the cache"):
        attend(tables=KVTables(tables.block_table, tables.slots + 10000))
    with pytest.raises(IndexError, match="in no block"):
        attend(tables=KVTables(tables.block_table * 0 - 1, tables.slots))
    with pytest.raises(IndexError, match="outside its sequence"):
        attend(batch=replace(batch, context_lens=batch.context_lens - 1))


def test_scratch_is_bounded() -> None:
    def scratch(rows: int, sequences: int, context: int) -> int:
        return _cpu.attention_scratch_bytes(32, 8, 128, rows, sequences, context)

    assert scratch(1, 1, 128) < scratch(512, 1, 128) < scratch(512, 16, 128) < scratch(512, 16, 1 << 17)
    cache_bytes = 16 * (1 << 17) * 8 * 128 * 4
    assert scratch(512, 16, 1 << 17) < cache_bytes / 100
