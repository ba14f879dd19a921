"""Weights in memory that exists already: packed on the host, fetched, and computed with where they were put."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.virtual.backend import VirtualBackend
from chandra.errors import BudgetExceeded
from chandra.memory.device import Device
from chandra.ops.contracts import Activation, Array, Backend, Experts, Linear, Weight
from chandra.ops.reference import ReferenceBackend
from chandra.quant import PackedWeight, get_format

BACKENDS: dict[str, Callable[[], Backend]] = {
    "reference": ReferenceBackend,
    "cpu": lambda: CpuBackend(Device("cpu", "cpu", 1 << 30)),
    "virtual": lambda: VirtualBackend(Device("virtual:0", "virtual", 1 << 30)),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


def random_weight(form: str, shape: tuple[int, ...], seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    return PackedWeight.pack(get_format(form), torch.randn(shape, generator=generator))


def through_memory(backend: Backend, weight: PackedWeight) -> Weight:
    """Packed, fetched and bound; every step where streaming does it, the binding first."""
    nbytes = backend.weight_nbytes(weight.format, weight.shape)
    assert nbytes % 64 == 0
    memory = backend.empty((nbytes,), "uint8")
    bound = backend.bind_weight(weight.format, weight.shape, memory)
    assert bound.nbytes <= nbytes
    host = backend.host_buffer(nbytes)
    host[...] = 0xA5  # nothing may depend on what was there
    backend.pack_weight(weight, host)
    backend.fetch(host, memory).done()
    host[...] = 0x5A
    return bound


def product(backend: Backend, weight: Weight, rows: int) -> Array:
    x = np.random.default_rng(1).standard_normal((rows, weight.shape[-1])).astype(np.float32)
    out = backend.empty((rows, weight.shape[0]), "float32")
    backend.norm_linear(x, None, (Linear(weight),), (out,))
    return out.copy()


@pytest.mark.parametrize("form", ["F32", "BF16", "Q8_0", "Q4_K", "Q5_0", "Q6_K", "IQ4_NL", "int8", "int4-g64", "nf4"])
@pytest.mark.parametrize("shape", [(48, 256), (53, 512)])
def test_a_bound_weight_computes_what_a_loaded_one_does(backend: Backend, form: str, shape: tuple[int, ...]) -> None:
    weight = random_weight(form, shape)
    loaded, bound = backend.load_weight(weight), through_memory(backend, weight)
    for rows in (1, 5):
        assert np.array_equal(product(backend, loaded, rows), product(backend, bound, rows))


def test_formats_without_a_kernel_for_a_shape_are_bound_unpacked() -> None:
    backend = CpuBackend(Device("cpu", "cpu", 1 << 30))
    for form, shape in (("nf4", (40, 96)), ("nf4-dq", (16, 160))):
        weight = random_weight(form, shape)
        assert np.array_equal(
            product(backend, backend.load_weight(weight), 3), product(backend, through_memory(backend, weight), 3)
        )


def test_experts_are_bound(backend: Backend) -> None:
    experts, hidden, ff = 4, 64, 96
    shapes = [(experts, ff, hidden), (experts, ff, hidden), (experts, hidden, ff)]
    packed = [random_weight("Q8_0", shape, i) for i, shape in enumerate(shapes)]
    router = Linear(backend.load_weight(random_weight("F32", (experts, hidden))))
    activation: Activation = "silu"
    x = np.random.default_rng(2).standard_normal((7, hidden)).astype(np.float32)
    results = []
    for make in (backend.load_weight, lambda weight: through_memory(backend, weight)):
        residual = backend.empty((7, hidden), "float32")
        residual[...] = x
        backend.moe_add(residual, None, Experts(router, *map(make, packed), 2, True, activation), None, residual)
        results.append(residual.copy())
    assert np.array_equal(*results)


def test_a_slot_holds_one_weight_after_another() -> None:
    backend = CpuBackend(Device("cpu", "cpu", 1 << 30))
    weights = [random_weight("Q4_K", (32, 256), seed) for seed in range(3)]
    nbytes = backend.weight_nbytes(weights[0].format, weights[0].shape)
    slot, host = backend.empty((nbytes,), "uint8"), backend.host_buffer(nbytes)
    bound = backend.bind_weight(weights[0].format, weights[0].shape, slot)
    for weight in weights:
        backend.pack_weight(weight, host)
        backend.fetch(host, slot).done()
        assert np.array_equal(product(backend, bound, 2), product(backend, backend.load_weight(weight), 2))


def test_memory_that_does_not_fit_is_refused() -> None:
    backend, weight = CpuBackend(Device("cpu", "cpu", 1 << 30)), random_weight("Q8_0", (16, 64))
    nbytes = backend.weight_nbytes(weight.format, weight.shape)
    memory = backend.host_buffer(nbytes + 64)
    for wrong in (memory, memory[4 : nbytes + 4], memory[:nbytes].view(np.float32)):
        with pytest.raises(ValueError, match=r"array|panels"):
            backend.bind_weight(weight.format, weight.shape, wrong)
        with pytest.raises(ValueError, match=r"array|panels"):
            backend.pack_weight(weight, wrong)


def test_a_virtual_device_counts_slots_and_copies_beside_computation() -> None:
    backend = VirtualBackend(Device("virtual:0", "virtual", 1 << 20, link=4e6))
    slots = backend.empty((1 << 20,), "uint8")
    assert backend.arena.used == 1 << 20
    with pytest.raises(BudgetExceeded):
        backend.empty((1,), "uint8")
    host = backend.host_buffer(1 << 20)
    host[...] = 7
    started = time.perf_counter()
    first = backend.fetch(host[: 1 << 19], slots[: 1 << 19])
    second = backend.fetch(host[1 << 19 :], slots[1 << 19 :])
    issued = time.perf_counter() - started
    first.wait()
    second.wait()
    taken = time.perf_counter() - started
    assert taken >= (1 << 20) / 4e6  # the simulated link's time, the copies one after the other
    assert issued < taken / 2
    assert (slots == 7).all()
    del slots
    assert backend.arena.used == 0


def test_what_a_copy_raises_is_raised_by_wait_and_the_thread_ends_with_the_backend() -> None:
    backend, before = VirtualBackend(Device("virtual:0", "virtual", 1 << 20)), set(threading.enumerate())
    failed = backend.fetch(np.zeros(64, np.uint8), backend.empty((32,), "uint8"))
    with pytest.raises(ValueError, match="broadcast"):
        failed.wait()
    threads = set(threading.enumerate()) - before
    assert threads
    del backend, failed
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
