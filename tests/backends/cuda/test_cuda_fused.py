"""The row kernels of the CUDA backend in Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from cuda_device import call

from chandra.backends.cuda import fused
from chandra.ops.contracts import AttentionParams, KVLayer, Norm, RopeParams
from chandra.ops.reference import cache_dtype, normed, packed_rows, rotated, unpacked_rows

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of values around 1
KV_TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0"]


def random_norm(generator: torch.Generator, width: int, kind: Literal["rms", "layer"]) -> Norm:
    weight, bias = torch.randn(2, width, generator=generator)
    return Norm(weight + 1, 1e-5, kind, bias if kind == "layer" else None)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("kind", ["rms", "layer", None])
@pytest.mark.parametrize("width", [48, 896, 5120])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_norms_match_float64(generator: torch.Generator, kind: Any, width: int, dtype: torch.dtype) -> None:
    x = 3 * torch.randn(3, width, generator=generator)
    norm = None if kind is None else random_norm(generator, width, kind)
    wanted = normed(x.double(), norm)
    bound = TOLERANCE[dtype]
    out = torch.empty(3, width, dtype=dtype)
    call(fused.norm, x, norm, out)
    torch.testing.assert_close(out.double(), wanted, rtol=bound, atol=bound)
    gathered = torch.empty(2, width, dtype=dtype)
    call(fused.norm, x, norm, gathered, torch.tensor([2, 0], dtype=torch.int32))
    assert torch.equal(gathered, out[[2, 0]])


@pytest.mark.parametrize("kind", ["rms", "layer", None])
def test_normed_rows_are_added_to_the_residual(generator: torch.Generator, kind: Any) -> None:
    y, residual = torch.randn(2, 3, 80, generator=generator)
    norm = None if kind is None else random_norm(generator, 80, kind)
    wanted = residual.double() + normed(y.double(), norm)
    call(fused.norm, y, norm, residual, None, True)
    torch.testing.assert_close(residual.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits(generator: torch.Generator, softcap: float | None) -> None:
    logits = 100 * torch.randn(3, 1003, generator=generator)
    wanted = logits.double() * 0.7
    if softcap is not None:
        wanted = softcap * torch.tanh(wanted / softcap)
    call(fused.logits_finish, logits, 0.7, softcap)
    torch.testing.assert_close(logits.double(), wanted, rtol=2e-6, atol=1e-5)


def empty_cache(kv_type: str, heads: int, d: int, blocks: int = 4, block_size: int = 8) -> KVLayer:
    width = packed_rows(torch.zeros(1, d), kv_type).shape[-1]
    shape = (blocks, heads, block_size, width)
    sides = [torch.zeros(shape, dtype=torch.uint8).to(cache_dtype(kv_type)) for _ in range(2)]
    return KVLayer(sides[0], sides[1], kv_type, block_size)


def written(side: torch.Tensor, slots: torch.Tensor, block_size: int) -> torch.Tensor:
    """The rows (n, K, row) at these slots."""
    return side[slots.long() // block_size, :, slots.long() % block_size]


POSITIONS = torch.tensor([0, 1, 77, 4095, 1_000_000], dtype=torch.int32)
SLOTS = torch.tensor([5, 30, 8, 17, 6], dtype=torch.int32)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "rotary", "more"),
    [
        (6, 2, 64, 64, {}),
        (3, 1, 96, 96, {"scale": 1.3}),
        (10, 9, 32, 24, {"interleaved": True, "scale": 0.7}),
        (2, 2, 128, 0, {}),
    ],
)
def test_rope_and_what_is_written(
    generator: torch.Generator, kv_type: str, heads: int, kv_heads: int, d: int, rotary: int, more: Any
) -> None:
    frequencies = 10000.0 ** -(torch.arange(rotary // 2) * 2 / max(rotary, 1))
    rope = RopeParams(frequencies, **more) if rotary else None
    params = AttentionParams(heads, kv_heads, d, 1.0, rope=rope)
    q = torch.randn(5, heads * d, generator=generator)
    k, v = torch.randn(2, 5, kv_heads * d, generator=generator)
    cache, q_out = empty_cache(kv_type, kv_heads, d), torch.empty_like(q)
    call(fused.rope_write, q.clone(), k.clone(), v, POSITIONS, params, cache, SLOTS, q_out)

    queries, keys = (x.double().reshape(5, -1, d) for x in (q, k))
    if rope is not None:
        queries, keys = (rotated(x, POSITIONS.numpy(), rope) for x in (queries, keys))
    torch.testing.assert_close(q_out.double(), queries.reshape(5, -1), rtol=0, atol=2e-6)
    values = packed_rows(v.reshape(5, -1, d), kv_type)
    assert torch.equal(written(cache.v, SLOTS, 8), values)
    wanted, got = packed_rows(keys.float(), kv_type), written(cache.k, SLOTS, 8)
    if rope is None:
        assert torch.equal(got, wanted)
    else:  # the last bit of a sine may turn a code
        step = (unpacked_rows(got, kv_type, d) - unpacked_rows(wanted, kv_type, d)).abs()
        assert (step > 1e-6).double().mean() < 0.01
        assert step.max() < 1
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[SLOTS.long()] = False
    others = torch.nonzero(untouched)[:, 0]
    assert not written(cache.k, others, 8).any()
    assert not written(cache.v, others, 8).any()


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_ties_zeros_and_halves_are_packed_as_the_format_does(generator: torch.Generator, kv_type: str) -> None:
    choices = torch.tensor([-127.0, -126.5, -2.5, -0.5, 0.0, 0.5, 1.5, 63.5, 126.5, 127.0]) / 8
    v = choices[torch.randint(10, (5, 4 * 64), generator=generator)]
    v[1] = 0.0
    v[2, :64] *= 1e-6
    v[3] = torch.where(v[3] == 0, 0.0, v[3].sign())
    cache = empty_cache(kv_type, 4, 64)
    params = AttentionParams(4, 4, 64, 1.0)
    call(fused.rope_write, v, v, v, POSITIONS, params, cache, SLOTS, torch.empty_like(v))
    assert torch.equal(written(cache.v, SLOTS, 8), packed_rows(v.reshape(5, 4, 64), kv_type))
    assert torch.equal(cache.k, cache.v)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_head_norms_come_before_rope(generator: torch.Generator, kind: Any, interleaved: bool) -> None:
    d = 80
    q_norm, k_norm = random_norm(generator, d, kind), random_norm(generator, d, kind)
    rope = RopeParams(10000.0 ** -(torch.arange(d // 4) / (d // 4)), interleaved=interleaved)
    params = AttentionParams(4, 2, d, 1.0, rope=rope, q_norm=q_norm, k_norm=k_norm)
    q = torch.randn(5, 4 * d, generator=generator)
    k, v = torch.randn(2, 5, 2 * d, generator=generator)
    cache, q_out = empty_cache("f32", 2, d), torch.empty_like(q)
    call(fused.rope_write, q, k, v, POSITIONS, params, cache, SLOTS, q_out)
    for got, x, norm in [(q_out.reshape(5, -1, d), q, q_norm), (written(cache.k, SLOTS, 8), k, k_norm)]:
        wanted = rotated(normed(x.double().reshape(5, -1, d), norm), POSITIONS.numpy(), rope)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=5e-6)


def test_rows_without_a_slot_are_not_written(generator: torch.Generator) -> None:
    q = torch.randn(5, 64, generator=generator)
    cache = empty_cache("f16", 1, 64)
    call(
        fused.rope_write, q, q, q, POSITIONS, AttentionParams(1, 1, 64, 1.0), cache, SLOTS * 0 - 1, torch.empty_like(q)
    )
    assert not cache.k.any()
    assert not cache.v.any()


def test_company_changes_no_bit(generator: torch.Generator) -> None:
    x = torch.randn(4, 896, generator=generator)
    norm = random_norm(generator, 896, "rms")
    together, alone = torch.empty_like(x), torch.empty(1, 896)
    call(fused.norm, x, norm, together)
    call(fused.norm, x[2:3], norm, alone)
    assert np.array_equal(together[2:3], alone)
