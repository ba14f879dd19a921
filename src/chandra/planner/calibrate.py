"""What this machine can do, measured: the one part of the planner that touches the world."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends import make_backend
from chandra.backends.cuda.driver import usable_gpus
from chandra.checkpoint import Checkpoint, MappedFile
from chandra.config import Settings
from chandra.errors import DeviceError
from chandra.memory.device import Device, parse_device
from chandra.memory.host import memory_available, resident_bytes, trim_heap, usable_cores
from chandra.ops.contracts import (
    Array,
    AttentionParams,
    Backend,
    ForwardBatch,
    KVLayer,
    KVTables,
    Linear,
    Norm,
)
from chandra.planner.actuals import FILE, Actuals
from chandra.planner.candidate import BLOCK_SIZE
from chandra.planner.cost import ASSUMED_HOST, Machine, Profile, Rate, machine_with
from chandra.planner.request import PlanRequest
from chandra.quant import PackedWeight, get_format

BASELINE_STEP = 2 << 20  # bytes: the process is never measured to the page, so that plans repeat
QUICK = ("Q4_K", "Q5_0", "Q6_K", "Q8_0", "F16")
THOROUGH = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32", "int8", "nf4")
LAYERS = 16  # of which the overhead is measured
SUSTAINED = 0.87  # share of a kernel's best rate at one row that a model's steps reach: measured on three of them
SAMPLE = 64 << 20  # bytes of a model that are brought in to see how fast that goes
VERSION = 4  # of what is measured and of the kernels: raise it when an old calibration would mislead


@dataclass(frozen=True)
class Load:
    """What a device is measured with: matrices of this width, more bytes of them than its caches hold, and rows of the
    long product."""

    width: int
    caches: int
    rows: int


HOST_LOAD, GPU_LOAD = Load(2048, 64 << 20, 128), Load(8192, 256 << 20, 1024)


def discover(request: PlanRequest, settings: Settings, vocab_size: int = 0) -> tuple[tuple[Device, ...], Machine]:
    """The devices to plan for and what they do. `vocab_size`: of a model that another process will run; 0: this one
    will, and has read its vocabulary.

    Measures the machine for a moment if that was never done. Raises UsageError, and DeviceError for a GPU that was
    named and is missing or cannot be used; if none was named, that is logged and the CPU has to do.
    """
    devices, machine = request.devices(_gpus(request)), known_machine(settings)
    trim_heap()
    taken, actuals = sum(resident_bytes()), Actuals.read(settings.home)
    process = actuals.process(devices, 0 if vocab_size else taken, vocab_size)
    host = replace(machine.host, runtime=-(-process // BASELINE_STEP) * BASELINE_STEP)
    measured = {d.name: p for d in devices if (p := machine.profiles.get(d.name.split("/")[0]))}
    cap = next(device.cap for device in devices if device.name == "cpu")
    machine = replace(machine, profiles=measured | {"cpu": host}, cache=max(0, memory_available() + taken - cap))
    machine = machine_with(replace(machine, actuals=str(actuals) if actuals else ""), devices)
    profiles = dict(machine.profiles)
    for name in (device.name for device in devices if device.kind == "cuda"):
        context = actuals.of(f"context {name.split('/')[0]}", profiles[name].runtime)
        profiles[name] = replace(profiles[name], runtime=context)
    return devices, replace(machine, profiles=profiles)


def cached_rate(checkpoint: Checkpoint) -> float:
    """Bytes/s of this model's pages that the system still has: it keeps a file in smaller or larger pieces, as it came
    in, and that makes a difference of ten. Reads up to SAMPLE bytes of the file."""
    names, nbytes = [], 0
    for tensor in sorted(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes):
        if nbytes + tensor.nbytes <= SAMPLE:
            names.append(tensor.name)
            nbytes += tensor.nbytes

    def bring() -> None:
        for name in names:
            checkpoint.prefetch(name)
            checkpoint.release(name)

    return nbytes / _best(bring, 1)


def _gpus(request: PlanRequest) -> tuple[Device, ...]:
    """The GPUs of this machine, where the request may mean them."""
    if not request.may_use_gpus():
        return ()
    try:
        return usable_gpus()
    except DeviceError as error:
        if any(parse_device(text).kind == "cuda" for text in request.device):
            raise
        import logging

        message = "chandra: %s\nchandra: the GPU is NOT used: everything runs on the CPU"
        logging.getLogger(__name__).warning(message, error)
        return ()


def known_machine(settings: Settings) -> Machine:
    """The calibration of this machine; a quick one is made and kept if there is none."""
    with suppress(KeyError, TypeError, ValueError):
        return _from_json(_stored(settings)["figures"])
    return calibrate(settings, quick=True)


def calibrated(settings: Settings) -> str | None:
    """When this machine was calibrated, as ISO 8601; None if it was not, or was another one then."""
    return _stored(settings).get("date")


def _stored(settings: Settings) -> dict[str, Any]:
    """The file of the calibration, if it is of this machine; else nothing."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored: dict[str, Any] = json.loads((settings.home / FILE).read_text(encoding="utf-8"))
        if stored["machine"] == _identity(settings):
            return stored
    return {}


def calibrate(settings: Settings, quick: bool = False) -> Machine:
    """Measure with the real kernels, keep the result in the store's folder, return it. Quick: under a second.

    A busy machine looks slower than it is; the best of a few tries counts.
    """
    if memory_available() < 4 * HOST_LOAD.caches:
        return ASSUMED_HOST
    cap = 8 * HOST_LOAD.caches
    backend = make_backend(Device("cpu", "cpu", cap), settings.threads, settings.cpu)
    rates = tuple((name, _rate(backend, name, 2 if quick else 5)) for name in (QUICK if quick else THOROUGH))
    attention = _attention_rate(backend, 2 if quick else 5)
    host = Profile(rates, _layer_overhead(backend), None, ASSUMED_HOST.host.runtime, attention)
    gpus = {} if quick else {gpu.name: _gpu_profile(gpu) for gpu in usable_gpus()}
    disk, cached = _disk_rates(settings.home, 32 << 20 if quick else 256 << 20)
    machine = Machine({"cpu": host} | gpus, disk, cached=cached)
    if not quick:
        machine = replace(machine, convert=_convert_rate())
    date = datetime.now(UTC).isoformat(timespec="seconds")
    document = {"machine": _identity(settings), "date": date, "figures": asdict(machine)}
    with suppress(OSError):  # a folder that cannot be written only means that it is measured again
        settings.home.mkdir(parents=True, exist_ok=True)
        (settings.home / FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    return machine


def _identity(settings: Settings) -> dict[str, Any]:
    """What a calibration is good for."""
    model, cores = platform.machine(), settings.threads or usable_cores()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": model, "cores": cores, "isa": settings.cpu or "best", "version": VERSION}


def _from_json(figures: dict[str, Any]) -> Machine:
    profiles = {}
    for name, known in figures["profiles"].items():
        rates = tuple((form, Rate(**rate)) for form, rate in known["rates"])
        profiles[name] = Profile(
            **known | {"rates": rates, "attention": known["attention"] and Rate(**known["attention"])}
        )
    return Machine(**figures | {"profiles": profiles})


def _best(run: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _linear(backend: Backend, name: str, rows: int, columns: int, stored: bool = False) -> Linear:
    form, shape = get_format(name), (rows, columns)
    parts = {part.name: np.full(part.shape, 0, part.dtype) for part in form.parts(shape)}  # written: memory of its own
    return Linear(backend.load_weight(PackedWeight(form, shape, parts), stored))


def _rate(backend: Backend, name: str, tries: int, load: Load = HOST_LOAD) -> Rate:
    """Of one format: weights too many for the caches against one row, then a few of them against many."""
    width, nbytes = load.width, get_format(name).nbytes((load.width, load.width))
    linears = [_linear(backend, name, width, width) for _ in range(-(-load.caches // nbytes))]

    def run(rows: int, used: list[Linear]) -> float:
        x, out = backend.upload(np.ones((rows, width), np.float32)), backend.empty((rows, width), "float32")

        def products() -> None:
            for linear in used:
                backend.norm_linear(x, None, (linear,), (out,))

        return _best(lambda: _finish(backend, (name, rows), products, out), tries)

    decode = SUSTAINED * len(linears) * nbytes / run(1, linears)
    prefill = 2 * load.rows * width**2 / run(load.rows, linears[:2])
    if backend.device.kind != "cpu":
        return Rate(decode, prefill)
    stored = [_linear(backend, name, width, width, stored=True) for _ in range(16)]
    return Rate(decode, prefill, len(stored) * nbytes / run(1, stored))


def _finish(backend: Backend, segment: object, ops: Callable[[], None], out: Array) -> None:
    """Do the ops as a step of one row does them, and wait for their end."""
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    backend.step(segment, ForwardBatch(zero, zero, np.arange(2, dtype=np.int32), one, zero), (), ops)
    backend.download(out[:1])


def _attention_rate(backend: Backend, tries: int) -> Rate:
    """Of the CPU: the caches of some layers read for one row, then the products of many rows with them."""
    heads, kv_heads, dim, context, rows, layers = 8, 4, 64, 1024, 128, 16
    params = AttentionParams(heads, kv_heads, dim, dim**-0.5)
    cache = np.zeros((2 * layers, context // BLOCK_SIZE, kv_heads, BLOCK_SIZE, dim), np.float16)
    caches = [KVLayer(k, v, "f16", BLOCK_SIZE) for k, v in zip(cache[::2], cache[1::2], strict=True)]
    blocks = np.arange(context // BLOCK_SIZE, dtype=np.int32)[None]

    def run(n: int) -> float:
        positions = np.arange(context - n, context, dtype=np.int32)
        ends, contexts = np.array([0, n], np.int32), np.array([context], np.int32)
        batch, tables = ForwardBatch(positions, positions, ends, contexts, positions[:0]), KVTables(blocks, positions)
        q, out = np.ones((n, heads * dim), np.float32), backend.empty((n, heads * dim), "float32")
        k, v = np.ones((2, n, kv_heads * dim), np.float32)

        def layers_of_it() -> None:
            for each in caches:
                backend.attention(q, k, v, batch, params, each, tables, out)

        return _best(layers_of_it, tries)

    return Rate(cache.nbytes / run(1), layers * rows * 2 * heads * dim * (context - rows / 2) / run(rows))


def _layer_overhead(backend: Backend) -> float:
    """Seconds of the calls of a layer that has next to no weights; a layer makes about six."""
    linear, norm = _linear(backend, "F16", 64, 64), Norm(backend.upload(np.ones(64, np.float32)), 1e-6)
    x, out = backend.upload(np.ones((1, 64), np.float32)), backend.empty((1, 64), "float32")

    def layers() -> None:
        for _ in range(LAYERS):
            for _ in range(6):
                backend.norm_linear(x, norm, (linear,), (out,))

    return _best(lambda: _finish(backend, "overhead", layers, out), 20) / LAYERS


def _gpu_profile(device: Device) -> Profile:
    """A GPU, measured; `runtime` is what its memory has lost to the context and the libraries."""
    from chandra.backends.cuda.backend import CudaBackend  # imports Triton

    backend = CudaBackend(device, graphs=64 << 20)
    rates = tuple((name, _rate(backend, name, 5, GPU_LOAD)) for name in QUICK)
    overhead = _layer_overhead(backend)
    nbytes = GPU_LOAD.caches
    host, out = backend.host_buffer(nbytes), backend.empty((nbytes,), "uint8")
    link = nbytes / _best(lambda: backend.write(host, out), 5)
    return Profile(rates, overhead, link, backend.context_bytes())


def _disk_rates(folder: Path, nbytes: int) -> tuple[float, float]:
    """Bytes/s read from the disk of the store, without the page cache, and of pages brought in from there: of a model
    in the store, or of a file made for it."""
    try:
        files = sorted((folder / "blobs").glob("sha256-*"), key=lambda path: path.stat().st_size, reverse=True)
        if files and files[0].stat().st_size >= nbytes:
            return _read_rates(files[0], nbytes)
        import tempfile

        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(os.urandom(1 << 20) * (nbytes >> 20))
            file.flush()
            os.fsync(file.fileno())
            return _read_rates(Path(file.name), nbytes)
    except OSError:
        return ASSUMED_HOST.disk, ASSUMED_HOST.cached


def _read_rates(path: Path, nbytes: int) -> tuple[float, float]:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        done = 0
        while done < nbytes and (count := file.readinto(buffer)):
            done += count
        disk = done / max(time.perf_counter() - start, 1e-9)
    mapped, piece = MappedFile(path), 8 << 20

    def bring() -> None:
        for start in range(0, done, piece):
            mapped.prefetch(start, min(piece, done - start))
            mapped.release(start, min(piece, done - start))

    cached = done / _best(bring, 3)
    mapped.close()
    return disk, cached


def _convert_rate() -> float:
    """Values/s that are packed while loading (imports torch)."""
    from chandra.lazy import torch

    values = torch.randn(1024, 1024)
    return values.numel() / _best(lambda: PackedWeight.pack(get_format("Q4_K"), values), 2)
