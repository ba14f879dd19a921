"""The CUDA backend as a whole, on torch's CPU and in Triton's interpreter: the same class and kernels as on a GPU."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from cuda_model import BLOCKS, Model
from triton.runtime import interpreter

from chandra.backends.cpu.backend import CpuBackend
from chandra.backends.cuda.accelerator import Accelerator, guard
from chandra.backends.cuda.backend import CudaBackend
from chandra.errors import BudgetExceeded, DeviceError
from chandra.memory.device import Device
from chandra.memory.plan import Placement
from chandra.ops.contracts import ForwardBatch
from chandra.ops.reference import ReferenceBackend
from chandra.quant import PackedWeight, get_format

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities that the kernels mask


def cpu() -> CpuBackend:
    return CpuBackend(Device("cpu", "cpu", 1 << 30))


def cuda(name: str = "cuda:0", cap: int = 1 << 27, **sizes: int) -> CudaBackend:
    return CudaBackend(Device(name, "cuda", cap), accelerator=Accelerator(), **sizes)


def deviation(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Root mean square of the difference, of that of what is wanted."""
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize(
    ("name", "form", "kv_type"),
    [("llama", "Q4_0", "f16"), ("gemma3", "Q8_0", "q8_0"), ("mixtral", "Q8_0", "f16"), ("qwen2", "BF16", "bf16")],
)
def test_a_model_says_what_the_reference_says(name: str, form: str, kv_type: str) -> None:
    wanted = Model(name, [ReferenceBackend()], form, kv_type).talk(2)
    got = Model(name, [cuda(graphs=1 << 20)], form, kv_type).talk(2)
    assert np.isfinite(got).all()
    assert deviation(got, wanted) < 0.02
    assert np.array_equal(got.argmax(-1), wanted.argmax(-1))


def test_layers_lie_on_two_logical_devices_and_the_cpu() -> None:
    wanted = Model("llama", [cpu()]).talk(1)
    host, first, second = cpu(), cuda("cuda:0"), cuda("cuda:0/1")
    got = Model("llama", [host, first, second]).talk(1)
    assert deviation(got, wanted) < 0.08  # the CPU rounds activations to int8
    assert first.arena.peak > 0
    assert second.arena.peak > 0


def test_streamed_layers_say_the_same() -> None:
    backend = cuda(graphs=1 << 20)
    wanted = Model("llama", [backend], "Q4_0").talk(2)
    assert np.array_equal(Model("llama", [backend], "Q4_0", streamed=2).talk(2), wanted)


def test_layers_that_move_between_steps_say_the_same() -> None:
    backend = cuda(graphs=1 << 20)
    model = Model("llama", [backend], "Q4_0")
    wanted = model.talk(2)
    graphs, mover = backend._graphs, model.decoder.mover

    def besides() -> int:
        need = mover.needed(mover.places)
        return backend.arena.used - sum(nbytes for (device, _), nbytes in need.items() if device == "cuda:0")

    before = besides()
    moves: list[dict[int, Placement]] = [{0: "stream", 1: "disk"}, {0: "resident", 1: "resident"}]
    for places in moves:
        assert graphs._recorded
        model.decoder.move(places)
        assert not graphs._recorded  # they hold the addresses of weights that have gone
        assert np.array_equal(model.talk(2), wanted)
        assert besides() == before


def test_a_recorded_step_is_repeated_and_forgotten_when_memory_moves() -> None:
    backend = cuda(graphs=1 << 20)
    model = Model("llama", [backend])
    model.talk(2)
    graphs = backend._graphs
    assert len(graphs._recorded) == 1  # the step of two decodes
    again = model.step([[23], [33]], [12, 6])
    graphs.clear()
    assert np.array_equal(model.step([[23], [33]], [12, 6]), again)
    assert not graphs._recorded
    model.step([[23], [33]], [12, 6])
    assert graphs._recorded
    kept = backend.empty((4,), "float32")
    assert not graphs._recorded
    assert kept.nbytes == 16


def launches(model: Model, monkeypatch: pytest.MonkeyPatch, token: int, start: int) -> list[object]:
    """Kernels, grids and arguments of a step of two decodes: arrays as their addresses."""
    seen: list[object] = []
    run = interpreter.InterpretedFunction.run

    def listen(self: object, *args: object, grid: object, **kwargs: object) -> object:
        values = [*args, *sorted(kwargs.items())]
        seen.append((self.fn.__name__, grid, [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]))  # type: ignore[attr-defined]
        return run(self, *args, grid=grid, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", listen)
        model.step([[token], [token + 1]], [start, start - 5])
    return seen


def test_steps_of_one_size_make_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording holds for the next step only if nothing that is launched depends on what has changed."""
    model = Model("gemma3", [cuda()])
    model.talk(0)
    first, second = (launches(model, monkeypatch, 20 + i, 10 + i) for i in range(2))
    assert len(first) > 20
    assert first == second


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_all_that_a_model_starts_has_been_rehearsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kernel would be compiled in the middle of an answer."""
    model, seen = Model(name, [cuda()]), {True: set[str](), False: set[str]()}
    run = interpreter.InterpretedFunction.run

    def of(kernel: Any, key: str, value: object) -> object:
        """What of an argument a kernel is compiled for."""
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if key in (kernel.kwargs.get("do_not_specialize") or ()):
            return None
        constant = kernel.fn.__annotations__.get(key) is not None or not isinstance(value, int)
        return value if constant else (value == 1, value % 16 == 0)

    def listen(self: Any, *args: object, grid: object, warmup: bool = False, **kwargs: object) -> object:
        names = list(inspect.signature(self.fn).parameters)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        seen[warmup].add(repr((self.fn.__name__, [(k, of(self, k, v)) for k, v in arguments.items()])))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", listen)
    model.decoder.rehearse(model.pool.layer, BLOCKS, lambda *_: None)
    assert seen[True]
    assert not seen[False]
    model.talk(1)
    assert seen[False] <= seen[True]


def test_arrays_of_a_step_keep_their_addresses() -> None:
    backend = cuda()

    def begin(tokens: list[int]) -> tuple[int, ...]:
        n = len(tokens)
        rows = np.arange(n, dtype=np.int32)
        batch = ForwardBatch(np.array(tokens, np.int32), rows, np.arange(n + 1, dtype=np.int32), rows + 1, rows)
        backend.step("x", batch, (), lambda: None)
        here = backend._steps.batch(batch)
        assert here.token_ids.tolist() == tokens
        assert here.context_lens.tolist() == (rows + 1).tolist()
        arrays = here.token_ids, here.positions, here.query_start, here.context_lens, here.logit_rows
        return tuple(array.data_ptr() for array in arrays)

    first = begin([3, 4, 5])
    assert begin([1, 2, 3, 4, 5, 6]) != first
    assert begin([7, 8, 9]) == first


def test_every_byte_counts_and_comes_back() -> None:
    backend = cuda(cap=1 << 26)
    before = backend.arena.used
    array = backend.upload(np.arange(1 << 10, dtype=np.float32))
    weight = PackedWeight.pack(get_format("Q4_K"), torch.randn(64, 256))
    loaded = backend.load_weight(weight)
    assert loaded.nbytes == backend.weight_nbytes(weight.format, weight.shape)
    assert backend.arena.used == before + 4096 + loaded.nbytes
    assert backend.download(array).tolist() == list(range(1 << 10))
    view = array[5:9]
    del array, loaded
    gc.collect()
    assert backend.arena.used == before + 4096
    assert backend.download(view).tolist() == [5, 6, 7, 8]
    with pytest.raises(BudgetExceeded, match="do not fit"):
        backend.empty((1 << 26,), "uint8")
    del view
    gc.collect()
    assert backend.arena.used == before


def test_a_weight_can_be_fetched_into_memory_that_is_there() -> None:
    backend = cuda()
    weight = PackedWeight.pack(get_format("Q4_0"), torch.randn(32, 64))
    nbytes = backend.weight_nbytes(weight.format, weight.shape)
    slot, host = backend.empty((nbytes,), "uint8"), backend.host_buffer(nbytes)
    assert host.ctypes.data % 64 == 0
    bound = backend.bind_weight(weight.format, weight.shape, slot)
    backend.pack_weight(weight, host)
    backend.fetch(host, slot).wait()
    outs = []
    for loaded in (bound, backend.load_weight(weight)):
        out = backend.empty((2, 64), "float32")
        tokens = np.array([3, 31], np.int32)
        zero = np.zeros(2, np.int32)
        batch = ForwardBatch(tokens, zero, np.array([0, 1, 2], np.int32), zero + 1, zero[:0])
        backend.embed(batch, loaded, 1.0, out)
        outs.append(backend.download(out))
    assert np.array_equal(*outs)
    assert np.allclose(outs[0], weight.unpack().numpy()[[3, 31]])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total of ...\nMore"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_out_of_memory_is_that_of_the_logical_device(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    backend = cuda("cuda:0/1")
    used = backend.arena.used

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BudgetExceeded, match="out of memory") as raised:
        backend.empty((4,), "float32")
    assert raised.value.device == "cuda:0/1"
    assert raised.value.nbytes == (2 << 20 if "Tried" in str(error) else 0)
    assert backend.arena.used == used


def test_what_is_not_the_gpus_fault_is_not_called_so() -> None:
    with pytest.raises(RuntimeError, match="mine"), guard("cuda:0"):
        raise RuntimeError("mine")
    with pytest.raises(DeviceError, match="cuda:0/1 is lost"), guard("cuda:0/1"):
        raise RuntimeError("Triton Error [CUDA]: unspecified launch failure")
