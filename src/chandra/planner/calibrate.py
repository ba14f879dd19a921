"""What this machine can do, measured: the one part of the planner that touches the world."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from chandra.backends import make_backend
from chandra.config import Settings
from chandra.memory.device import Device
from chandra.memory.host import memory_available, resident_bytes, return_free_memory, usable_cores
from chandra.ops.contracts import Backend, Linear, Norm
from chandra.planner.cost import ASSUMED_HOST, Machine, Profile, Rate, machine_with
from chandra.planner.request import PlanRequest
from chandra.quant import PackedWeight, get_format

# Bytes of a process that runs a model, measured: with nothing but modules, for each entry of the vocabulary, and what
# it grows by when it computes (stacks of threads, code of kernels, what malloc keeps).
BASELINE, TOKEN, GROWTH = 46 << 20, 110, 4 << 20
BASELINE_STEP = 2 << 20  # bytes: the process is never measured to the page, so that plans repeat
QUICK = ("Q4_K", "Q6_K", "Q8_0", "F16")
THOROUGH = ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32", "int8", "nf4")
WIDTH = 2048  # of the matrices that are timed
CACHES = 64 << 20  # bytes that no processor's caches hold
PREFILL = 128  # rows of the long product
FILE = "calibration.json"
VERSION = 1  # of what is measured and of the kernels: raise it when an old calibration would mislead


def discover(
    request: PlanRequest, settings: Settings, present: Sequence[Device] = (), vocab_size: int = 0
) -> tuple[tuple[Device, ...], Machine]:
    """The devices to plan for and what they do. `present`: the GPUs of this machine that can be used. `vocab_size`: of
    a model that another process will run; 0: this one will, and has read its vocabulary.

    Measures the machine for a moment if that was never done. Raises UsageError, and DeviceError for a missing GPU.
    """
    devices, machine = request.devices(present), known_machine(settings)
    return_free_memory()
    taken = BASELINE + TOKEN * vocab_size if vocab_size else sum(resident_bytes())
    host = replace(machine.host, runtime=-(-(taken + GROWTH) // BASELINE_STEP) * BASELINE_STEP)
    return devices, machine_with(replace(machine, profiles={"cpu": host}), devices)


def known_machine(settings: Settings) -> Machine:
    """The calibration of this machine; a quick one is made and kept if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((settings.home / FILE).read_text(encoding="utf-8"))
        if stored["machine"] == _identity(settings):
            return _from_json(stored)
    return calibrate(settings, quick=True)


def calibrated(settings: Settings) -> str | None:
    """When this machine was calibrated, as ISO 8601; None if it was not, or was another one then."""
    with suppress(OSError, ValueError, KeyError):
        stored = json.loads((settings.home / FILE).read_text(encoding="utf-8"))
        return str(stored["date"]) if stored["machine"] == _identity(settings) else None
    return None


def calibrate(settings: Settings, quick: bool = False) -> Machine:
    """Measure with the real kernels, keep the result in the store's folder, return it. Quick: under a second.

    A busy machine looks slower than it is; the best of a few tries counts.
    """
    if memory_available() < 4 * CACHES:
        return ASSUMED_HOST
    cap = 8 * CACHES
    backend = make_backend(Device("cpu", "cpu", cap), settings.threads, settings.cpu)
    rates = tuple((name, _rate(backend, name, 2 if quick else 5)) for name in (QUICK if quick else THOROUGH))
    host = Profile(rates, _layer_overhead(backend), None, ASSUMED_HOST.host.runtime)
    machine = Machine({"cpu": host}, _disk_rate(settings.home, 32 << 20 if quick else 256 << 20))
    if not quick:
        machine = replace(machine, convert=_convert_rate())
    document = {"machine": _identity(settings), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    with suppress(OSError):  # a folder that cannot be written only means that it is measured again
        settings.home.mkdir(parents=True, exist_ok=True)
        (settings.home / FILE).write_text(json.dumps(document | _to_json(machine), indent=1), encoding="utf-8")
    return machine


def _identity(settings: Settings) -> dict[str, Any]:
    """What a calibration is good for."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        cores = settings.threads or usable_cores()
        return {"cpu": model, "cores": cores, "isa": settings.cpu or "best", "version": VERSION}
    return {"cpu": platform.processor(), "cores": os.cpu_count(), "isa": settings.cpu, "version": VERSION}


def _to_json(machine: Machine) -> dict[str, Any]:
    host = machine.host
    rates = {name: [rate.bandwidth, rate.macs] for name, rate in host.rates}
    return {"rates": rates, "layer_overhead": host.layer_overhead, "disk": machine.disk, "convert": machine.convert}


def _from_json(stored: dict[str, Any]) -> Machine:
    rates = tuple((name, Rate(*map(float, rate))) for name, rate in stored["rates"].items())
    host = Profile(rates, float(stored["layer_overhead"]), None, ASSUMED_HOST.host.runtime)
    return Machine({"cpu": host}, float(stored["disk"]), float(stored["convert"]))


def _best(run: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _linear(backend: Backend, name: str, rows: int, columns: int) -> Linear:
    form, shape = get_format(name), (rows, columns)
    parts = {part.name: np.zeros(part.shape, part.dtype) for part in form.parts(shape)}
    return Linear(backend.load_weight(PackedWeight(form, shape, parts)))


def _rate(backend: Backend, name: str, tries: int) -> Rate:
    """Of one format: weights too many for the caches against one row, then a few of them against many."""
    nbytes = get_format(name).nbytes((WIDTH, WIDTH))
    linears = [_linear(backend, name, WIDTH, WIDTH) for _ in range(-(-CACHES // nbytes))]

    def run(rows: int, used: list[Linear]) -> float:
        x, out = np.ones((rows, WIDTH), np.float32), backend.empty((rows, WIDTH), "float32")

        def product() -> None:
            for linear in used:
                backend.norm_linear(x, None, (linear,), (out,))

        return _best(product, tries)

    decode = len(linears) * nbytes / run(1, linears)
    return Rate(decode, 2 * PREFILL * WIDTH**2 / run(PREFILL, linears[:2]))


def _layer_overhead(backend: Backend) -> float:
    """Seconds of the calls of a layer that has next to no weights; a layer makes about six."""
    linear, norm = _linear(backend, "F16", 64, 64), Norm(np.ones(64, np.float32), 1e-6)
    x, out = np.ones((1, 64), np.float32), backend.empty((1, 64), "float32")
    return 6 * _best(lambda: backend.norm_linear(x, norm, (linear,), (out,)), 20)


def _disk_rate(folder: Path, nbytes: int) -> float:
    """Bytes/s read from the disk of the store, without the page cache: of a model there, or of a file made for it."""
    try:
        files = sorted((folder / "blobs").glob("sha256-*"), key=lambda path: path.stat().st_size, reverse=True)
        if files and files[0].stat().st_size >= nbytes:
            return _read_rate(files[0], nbytes)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(os.urandom(1 << 20) * (nbytes >> 20))
            file.flush()
            os.fsync(file.fileno())
            return _read_rate(Path(file.name), nbytes)
    except OSError:
        return ASSUMED_HOST.disk


def _read_rate(path: Path, nbytes: int) -> float:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        done = 0
        while done < nbytes and (count := file.readinto(buffer)):
            done += count
        return done / max(time.perf_counter() - start, 1e-9)


def _convert_rate() -> float:
    """Values/s that are packed while loading (imports torch)."""
    from chandra.lazy import torch

    values = torch.randn(1024, 1024)
    return values.numel() / _best(lambda: PackedWeight.pack(get_format("Q4_K"), values), 2)
