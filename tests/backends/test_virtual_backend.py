from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import torch

from chandra.backends import make_backend
from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.virtual.backend import VirtualBackend
from chandra.errors import BudgetExceeded, DeviceError
from chandra.memory.device import Device
from chandra.ops import registry
from chandra.ops.contracts import Linear
from chandra.quant import PackedWeight, get_format

MIB = 1 << 20


def packed(name: str, rows: int, columns: int) -> PackedWeight:
    form = get_format(name)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, columns), np.float32))
    return PackedWeight(form, (rows, columns), {k: v.numpy() for k, v in form.pack(values).items()})


def virtual(cap: int, link: float | None = None, bandwidth: float | None = None) -> VirtualBackend:
    backend = make_backend(Device("virtual:0", "virtual", cap, bandwidth, link))
    assert isinstance(backend, VirtualBackend)
    return backend


def test_every_byte_counts_and_comes_back() -> None:
    backend = virtual(8 * MIB)
    array = backend.empty((MIB,), "float32")
    view = array[1:5].reshape(2, 2)
    weight = backend.load_weight(packed("Q8_0", 256, 1024))
    assert 4 * MIB + weight.nbytes <= backend.arena.used <= 4 * MIB + weight.nbytes + 4096
    uploaded = backend.upload(np.arange(5, dtype=np.int32))
    assert uploaded.tolist() == [0, 1, 2, 3, 4]
    peak = backend.arena.used
    del array, weight, uploaded
    gc.collect()
    assert backend.arena.used >= 4 * MIB  # the view still holds it
    del view
    gc.collect()
    assert backend.arena.used == 0
    assert backend.arena.peak >= peak


def test_the_cap_holds() -> None:
    backend = virtual(MIB)
    kept = backend.empty((MIB // 2,), "uint8")
    used = backend.arena.used
    with pytest.raises(BudgetExceeded, match="do not fit"):
        backend.empty((MIB // 2 + 1,), "uint8")
    with pytest.raises(BudgetExceeded, match="do not fit"):
        backend.load_weight(packed("F32", 256, 1024))
    gc.collect()
    assert backend.arena.used == used
    assert kept.nbytes == MIB // 2


@pytest.mark.parametrize("name", ["Q4_K", "nf4", "F16"])
def test_weights_leave_the_host_and_compute_the_same(name: str) -> None:
    weight = packed(name, 48, 256 if name != "nf4" else 36)  # nf4 in rows of 36 is read in place
    x = np.random.default_rng(1).standard_normal((3, weight.shape[1]), np.float32)
    outs = []
    for backend in (CpuBackend(Device("cpu", "cpu", 1 << 30)), virtual(MIB)):
        loaded = backend.load_weight(weight)
        if isinstance(backend, VirtualBackend):
            for part in weight.parts.values():
                part[...] = 0
        out = np.empty((3, 48), np.float32)
        backend.norm_linear(x, None, (Linear(loaded),), (out,))
        outs.append(out)
    assert np.array_equal(*outs)
    assert outs[0].any()


def test_link_and_memory_take_their_time() -> None:
    backend = virtual(64 * MIB, link=100e6, bandwidth=200e6)
    early = 0.001  # shorter waits are put off
    began = time.perf_counter()
    device_array = backend.upload(np.zeros(5_000_000, np.uint8))
    assert time.perf_counter() - began >= 0.05 - early
    began = time.perf_counter()
    backend.download(device_array)
    assert time.perf_counter() - began >= 0.05 - early
    weight = backend.load_weight(packed("F32", 512, 1024))
    x, out = np.zeros((1, 1024), np.float32), np.zeros((1, 512), np.float32)
    began = time.perf_counter()
    for _ in range(10):
        backend.norm_linear(x, None, (Linear(weight),), (out,))
    assert time.perf_counter() - began >= 10 * weight.nbytes / 200e6 - early


def test_other_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match="assumed"):
        make_backend(Device("gpu:0", "assumed", MIB))


def test_table_of_kernels() -> None:
    table = registry.kernels()
    assert {k.format for k in table if k.op == "attention"} == {"f32", "f16", "bf16", "q8_0", "q4_0"}
    assert registry.find("linear", "Q4_K", "cpu", (16, 256)).name == "panels"
    with pytest.raises(registry.UnsupportedError, match=r"q8_0.*\(40,\)"):
        registry.find("attention", "q8_0", "cpu", (40,))
