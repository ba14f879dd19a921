"""Attention of the CUDA backend in Triton's interpreter, against float64."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_reference import Case, random_case, reference
from cuda_device import call

from chandra.backends.cuda import attention, fused
from chandra.backends.cuda.sizes import num_splits, split_bytes
from chandra.ops.contracts import AttentionParams, KVLayer, Norm, RopeParams
from chandra.ops.reference import ReferenceBackend, tensor

KV_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
BOUND = {"f32": 3e-6, "f16": 2e-3, "bf16": 1.2e-2, "q8_0": 2e-3, "q4_0": 2e-3}  # of products in `query_dtype`
Parts = list[tuple[int, int, int]]


def on_device(params: AttentionParams) -> AttentionParams:
    def moved(norm: Norm | None) -> Norm | None:
        bias = None if norm is None or norm.bias is None else tensor(norm.bias)
        return norm and replace(norm, weight=tensor(norm.weight), bias=bias)

    rope = params.rope and replace(params.rope, inv_freq=tensor(params.rope.inv_freq))
    return replace(params, rope=rope, q_norm=moved(params.q_norm), k_norm=moved(params.k_norm))


def attend(case: Case, parts: Parts, filler: int = 0) -> Any:
    """What the kernels make of rows whose keys and values are in the cache already; `filler` rows at the end."""
    batch, tables, q, _, _ = case.batch(parts)
    cache = KVLayer(tensor(case.cache.k), tensor(case.cache.v), case.cache.kv_type, case.cache.block_size)
    query_start = np.append(batch.query_start, batch.query_start[-1] + 1 + np.arange(filler, dtype=np.int32))
    context_lens = np.append(batch.context_lens, np.zeros(filler, np.int32))
    block_table = np.pad(tables.block_table, ((0, filler), (0, 0)), constant_values=-1)
    queries = torch.from_numpy(np.pad(q, ((0, filler), (0, 0)))).to(attention.query_dtype(cache.kv_type))
    extent = attention.Extent.of(np.diff(query_start).tolist(), int(context_lens.max()))
    scratch_bytes = split_bytes(case.params.num_heads, case.params.head_dim, extent.sequences, extent.max_context)
    out = torch.full(queries.shape, torch.nan)
    call(
        attention.attention,
        queries,
        torch.from_numpy(query_start),
        torch.from_numpy(context_lens),
        torch.from_numpy(block_table),
        case.params,
        cache,
        out,
        torch.full((scratch_bytes // 4,), torch.nan),
        extent,
    )
    return out.numpy()


def expected(case: Case, parts: Parts) -> Any:
    """The reference, which writes keys and values of these parts to the cache."""
    batch, tables, q, k, v = case.batch(parts)
    out = np.empty_like(q)
    rounded = torch.from_numpy(q).to(attention.query_dtype(case.cache.kv_type)).float().numpy()
    ReferenceBackend().attention(rounded, k, v, batch, case.params, case.cache, tables, out)
    return out


def random(
    heads: int, kv_heads: int, d: int, lengths: list[int], kv_type: str = "f32", seed: int = 1, **more: Any
) -> Case:
    block_size = more.pop("block_size", 16)
    params = AttentionParams(heads, kv_heads, d, d**-0.5, **more)
    return random_case(np.random.default_rng(seed), params, lengths, kv_type, block_size)


def check(case: Case, parts: Parts) -> None:
    before = [(s, 0, begin) for s, begin, _ in parts if begin]
    if before:
        expected(case, before)
    wanted = expected(case, parts)
    np.testing.assert_allclose(attend(case, parts), wanted, rtol=0, atol=BOUND[case.cache.kv_type])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(6, 2, 64), (1, 1, 96), (8, 1, 128)])
def test_mixed_batches_match_float64(kv_type: str, heads: int, kv_heads: int, d: int) -> None:
    case = random(heads, kv_heads, d, [1, 20, 280, 75], kv_type)
    check(case, [(3, 60, 75), (0, 0, 1), (2, 279, 280), (1, 0, 20)])


@pytest.mark.parametrize("d", [80, 256])
@pytest.mark.parametrize("kv_type", ["f32", "bf16"])
def test_odd_and_wide_heads(kv_type: str, d: int) -> None:
    check(random(7, 1, d, [70, 40], kv_type), [(0, 69, 70), (1, 3, 40)])


@pytest.mark.parametrize("more", [{"window": 1}, {"window": 40}, {"window": 100, "softcap": 20.0}, {"softcap": 5.0}])
@pytest.mark.parametrize("kv_type", ["f32", "q8_0"])
def test_windows_and_caps(kv_type: str, more: dict[str, Any]) -> None:
    check(random(4, 2, 32 if kv_type == "f32" else 64, [300, 130], kv_type, **more), [(0, 299, 300), (1, 115, 130)])


@pytest.mark.parametrize("block_size", [5, 8, 64])
def test_any_block_size(block_size: int) -> None:
    check(random(4, 2, 32, [150, 30], block_size=block_size), [(0, 149, 150), (1, 0, 30)])


@pytest.mark.parametrize(
    ("window", "context"), [(300, 5300), (900, 4200), pytest.param(None, 5300, marks=pytest.mark.slow)]
)
def test_splits_of_long_contexts(window: int | None, context: int) -> None:
    check(random(2, 1, 16, [context], window=window), [(0, context - 1, context)])


def test_splits_cover_every_position_once() -> None:
    for context in [1, 128, 129, 4096, 4097, 4608, 4609, 131072]:
        splits = num_splits(context)
        starts = [min(i, 32) * 128 + max(i - 32, 0) * 512 for i in range(splits + 1)]
        assert starts[splits - 1] < context <= starts[splits]


@pytest.mark.parametrize("interleaved", [False, True])
def test_steps_of_a_model_match_float64(interleaved: bool) -> None:
    """Head norms, rope, the write to the cache and attention, in chunks and alone."""
    rng = np.random.default_rng(4)
    d = 32
    norms = [Norm(rng.standard_normal(d, np.float32) + 1, 1e-5) for _ in range(2)]
    rope = RopeParams((10000.0 ** -(np.arange(d // 2) * 2 / d)).astype(np.float32), 1.1, interleaved)
    case = random(4, 2, d, [28, 9], rope=rope, q_norm=norms[0], k_norm=norms[1])
    params = on_device(case.params)
    cache = KVLayer(tensor(case.cache.k), tensor(case.cache.v), "f32", 16)
    got: list[list[Any]] = [[], []]
    for parts in [[(0, 0, 20), (1, 0, 1)], [(1, 1, 9), (0, 20, 21)], [(0, 21, 28)]]:
        batch, tables, q, k, v = case.batch(parts)
        rotated, out = torch.empty(q.shape), torch.empty(q.shape)
        positions, slots = torch.from_numpy(batch.positions), torch.from_numpy(tables.slots)
        call(fused.rope_write, *map(torch.from_numpy, (q, k, v)), positions, params, cache, slots, rotated)
        extent = attention.Extent.of(np.diff(batch.query_start).tolist(), int(batch.context_lens.max()))
        scratch = torch.empty(split_bytes(params.num_heads, params.head_dim, extent.sequences, extent.max_context) // 4)
        arrays = map(torch.from_numpy, (batch.query_start, batch.context_lens, tables.block_table))
        call(attention.attention, rotated, *arrays, params, cache, out, scratch, extent)
        for i, (sequence, _, _) in enumerate(parts):
            got[sequence].append(out[batch.query_start[i] : batch.query_start[i + 1]])
    for sequence in range(2):
        np.testing.assert_allclose(torch.cat(got[sequence]), reference(case, sequence), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_type", ["f16", "q4_0"])
@pytest.mark.parametrize("window", [None, 70])
def test_company_and_chunks_change_no_bit(kv_type: str, window: int | None) -> None:
    case = random(3, 1, 32, [110, 40, 300], kv_type, window=window)
    expected(case, [(0, 0, 110), (1, 0, 40), (2, 0, 300)])
    together = attend(case, [(2, 299, 300), (0, 70, 110), (1, 39, 40)])
    assert np.array_equal(together[:1], attend(case, [(2, 299, 300)]))
    assert np.array_equal(together[-1:], attend(case, [(1, 39, 40)]))
    assert np.array_equal(together[1:-1], attend(case, [(0, 70, 110)]))
    chunks = [attend(case, [(0, b, e)]) for b, e in [(70, 73), (73, 110)]]
    assert np.array_equal(together[1:-1], np.concatenate(chunks))


def test_filler_of_a_graph_gives_zeros_and_changes_nothing() -> None:
    case = random(4, 2, 32, [300, 20])
    parts = [(0, 299, 300), (1, 19, 20)]
    expected(case, [(0, 0, 299), (1, 0, 19)])
    expected(case, parts)
    padded = attend(case, parts, filler=2)
    assert np.array_equal(padded[:2], attend(case, parts))
    assert not padded[2:].any()


def test_scratch_is_bounded() -> None:
    assert split_bytes(32, 128, 1, 128) == 32 * 130 * 4
    assert split_bytes(32, 128, 16, 1 << 17) < 16 * (1 << 17) * 8 * 128 * 4 / 100


def aot(*arguments: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("aot_attention.py")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(Path.home())}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures: list[dict[str, Any]] = json.loads(done.stdout)
    for figure in figures:
        assert figure["shared"] <= figure["limit"], figure
        assert figure["local"] <= (640 if figure["capability"] == 75 else 160), figure
    return figures


def test_kernels_compile_for_gpus() -> None:
    figures = aot("q8_0:4/1/64:75", "f16:32/8/128:80", "q4_0:32/8/128:90")
    assert {f["kernel"] for f in figures} >= {"rope_write", "prefill", "decode", "combine", "norm_rows"}
    assert {f["capability"] for f in figures} == {75, 80, 90}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_all_kernels_compile_for_all_gpus(capability: int, kv_type: str) -> None:
    shapes = ["4/4/64", "32/32/96", "14/2/64", "32/8/128", "40/8/128", "8/4/256", "71/1/64"]
    assert aot(*(f"{kv_type}:{shape}:{capability}" for shape in shapes))
