"""Cache sizes against known figures, and the pool's arrays against the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest

from chandra.errors import BudgetExceeded, UnsupportedError
from chandra.kvcache import KV_TYPES, KVPool, LayerGroup, group_layers, kv_bytes, kv_row, kv_row_bytes
from chandra.memory.device import Device
from chandra.memory.ledger import Kind, Ledger
from chandra.ops.contracts import Backend

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    head_dim: int
    window: int | None = None


GEMMA3_4B = [Shape(4, 256, None if i % 6 == 5 else 1024) for i in range(34)]


@pytest.mark.parametrize(
    ("shapes", "context", "mib"),
    [
        ([Shape(32, 128)] * 32, 4096, 2048),  # Llama 2 7B
        ([Shape(40, 128)] * 40, 4096, 3200),  # Llama 2 13B
        ([Shape(8, 128)] * 32, 8192, 1024),  # Llama 3 8B
        ([Shape(1, 256)] * 18, 8192, 144),  # Gemma 2B
        (GEMMA3_4B, 131072, 2560 + 174),
        ([Shape(s.num_kv_heads, s.head_dim) for s in GEMMA3_4B], 131072, 17408),  # the same without windows
    ],
)
@pytest.mark.parametrize("block_size", [16, 32])
def test_cache_bytes_of_known_models(shapes: list[Shape], context: int, mib: int, block_size: int) -> None:
    assert kv_bytes(group_layers(shapes), "f16", context, 512, block_size) == mib * MIB


PER_VALUE = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1.0625, "q4_0": 0.5625}


@pytest.mark.parametrize(("kv_type", "per_value"), PER_VALUE.items())
def test_row_bytes_match_the_array_rows(kv_type: str, per_value: float) -> None:
    length, dtype = kv_row(kv_type, 128)
    assert kv_row_bytes(kv_type, 128) == 128 * per_value == length * np.dtype(dtype).itemsize


def test_types_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not a multiple"):
        kv_row_bytes("q8_0", 80)
    with pytest.raises(UnsupportedError, match="q5_k"):
        kv_row_bytes("q5_k", 128)


def test_layers_are_grouped_by_window_shape_and_device() -> None:
    shapes = [Shape(2, 64), Shape(2, 64, 512), Shape(2, 64), Shape(4, 64)]
    assert group_layers(shapes, ["cpu", "cpu", "cuda:0", "cpu"]) == (
        LayerGroup((0,), 2, 64),
        LayerGroup((1,), 2, 64, 512),
        LayerGroup((2,), 2, 64, None, "cuda:0"),
        LayerGroup((3,), 4, 64),
    )
    assert [g.layers for g in group_layers(GEMMA3_4B)][1] == (5, 11, 17, 23, 29)


class Host:
    """The one method of a backend that the pool uses."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        return np.empty(shape, dtype)


def pool(kv_type: str, ledger: Ledger) -> KVPool:
    groups = group_layers([Shape(2, 64), Shape(2, 64, 32), Shape(2, 64)])
    return KVPool(groups, (10, 4), 16, kv_type, {"cpu": cast(Backend, Host())}, ledger)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_pool_reserves_what_it_allocates(kv_type: str) -> None:
    ledger = Ledger([Device("cpu", "cpu", 1 << 24)])
    cache = pool(kv_type, ledger)
    layers = [cache.layer(i) for i in range(3)]
    assert [layer.k.shape[:3] for layer in layers] == [(10, 2, 16), (4, 2, 16), (10, 2, 16)]
    (row,) = ledger.rows()
    assert (row.kind, row.reserved) == (Kind.KV, cache.nbytes)
    assert cache.nbytes == sum(layer.k.nbytes + layer.v.nbytes for layer in layers)
    cache.close()
    assert ledger.free("cpu") == 1 << 24


def test_a_pool_over_the_cap_leaves_nothing_reserved() -> None:
    ledger = Ledger([Device("cpu", "cpu", 90_000)])
    with pytest.raises(BudgetExceeded):
        pool("f16", ledger)
    assert ledger.free("cpu") == 90_000
