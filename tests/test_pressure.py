"""Memory that vanishes in the middle of 8 requests: all end with the right text, and what was done is told."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chandra import LLM
from chandra.backends.cuda.accelerator import asked
from chandra.backends.virtual.backend import VirtualBackend
from chandra.engine.model_runner import Forward
from chandra.errors import BudgetExceeded
from chandra.memory.host import _cgroup_folders, resident_bytes
from chandra.memory.ledger import Kind
from chandra.ops.contracts import ForwardBatch, KVView
from pressure_worker import MARGIN, MIB, PARAMS, add, finish

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model(model_file: Callable[[str], Path]) -> Path:
    return model_file("smollm2:135m")


def test_a_small_cache_gives_the_same_text_with_swap_and_without(model: Path) -> None:
    texts, counters = {}, {}
    for name, options in {
        "roomy": {"parallel": 8},
        "swap": {"parallel": 1, "device": "virtual:150MiB", "swap": "64MiB"},
        "recompute": {"parallel": 1, "device": "virtual:150MiB", "swap": "0B"},
    }.items():
        with LLM(model, ctx=160, **options) as llm:  # type: ignore[arg-type]
            texts[name] = add(llm)
            finish(llm, texts[name])
            counters[name] = llm.engine.counters()
            assert (llm.plan.swap_bytes > 0) == (name == "swap")
    assert texts["roomy"] == texts["swap"] == texts["recompute"]
    assert counters["roomy"].preemptions == 0
    assert counters["recompute"].preemptions > 0
    swapped = counters["swap"]
    assert swapped.swapped_out_blocks >= swapped.preemptions > 0
    assert swapped.swapped_in_bytes > 0


@pytest.mark.parametrize("device", ["cpu", "virtual:0"])
def test_a_cap_lowered_in_the_middle_is_kept(model: Path, device: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {} if device == "cpu" else {"device": "virtual:200MiB", "swap": "128MiB"}
    with LLM(model, ctx=256, parallel=8, **options) as llm:
        llm.runtime.pressure.patience = 3600  # nothing is taken back while a slow machine is at it
        undisturbed = add(llm)
        finish(llm, undisturbed)
        disturbed = add(llm)
        finish(llm, disturbed, 10)
        ledger, pool = llm.runtime.ledger, llm.runtime.pool
        held = sum(a.in_use for a in llm.engine.blocks.allocators)
        full, keep = pool.nbytes, held // 2 * pool.block_bytes[0]
        cap = llm.plan.device(device).cap
        reserved = cap - ledger.free(device)
        with caplog.at_level(logging.WARNING, "chandra"):
            ledger.set_cap(device, reserved - full + keep)
            finish(llm, disturbed)
        assert list(disturbed.values()) == list(undisturbed.values())
        counters = llm.engine.counters()
        assert counters.preemptions > 0
        assert (counters.swapped_in_bytes > 0) == (device != "cpu")
        assert [step.action for step in llm.pressure()] == ["cache", "spill"]
        assert len(caplog.records) == 2
        row = next(row for row in llm.memory() if (row.device, row.kind) == (device, "kv"))
        assert row.actual <= keep < row.predicted == full
        ledger.set_cap(device, cap)
        llm.runtime.pressure.patience = llm.runtime.pressure._next = 0.0
        llm.runtime.step()
        assert pool.nbytes == full
        again = add(llm)
        finish(llm, again)
        assert list(again.values()) == list(undisturbed.values())


class RunsOut:
    """A decoder whose device runs out of memory in one step."""

    def __init__(self, decoder: Forward, error: BudgetExceeded) -> None:
        self.decoder, self.error = decoder, error

    def forward(self, batch: ForwardBatch, kv: KVView) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.decoder.forward(batch, kv)  # what was written into the cache is written again
        self.forward = self.decoder.forward  # type: ignore[method-assign]
        raise self.error


def test_a_device_that_runs_out_in_a_step_gets_what_it_asked_for(model: Path) -> None:
    with LLM(model, ctx=128, parallel=8, device="virtual:200MiB") as llm:
        undisturbed = add(llm)
        finish(llm, undisturbed)
        disturbed = add(llm)
        finish(llm, disturbed, 4)
        free, runner = llm.runtime.ledger.free("virtual:0"), llm.engine.runner
        message = "CUDA out of memory. Tried to allocate 9.50 MiB. GPU 0 has a total capacity of 6.00 GiB"
        runner._decoder = RunsOut(runner._decoder, BudgetExceeded(message, device="virtual:0", nbytes=asked(message)))
        finish(llm, disturbed, 1)
        assert llm.runtime.ledger.free("virtual:0") >= free + 9.5 * MIB
        finish(llm, disturbed)
        assert list(disturbed.values()) == list(undisturbed.values())
        runner._decoder = RunsOut(llm.runtime.decoder, BudgetExceeded("elsewhere", device="cuda:7", nbytes=1))
        add(llm)
        with pytest.raises(BudgetExceeded, match="elsewhere"):
            llm.runtime.step()


def test_layers_are_read_from_the_file_while_memory_is_short(model: Path) -> None:
    with LLM(model, ctx=128, parallel=2, chunk=16) as llm:
        undisturbed = add(llm)
        finish(llm, undisturbed)
        disturbed = add(llm)
        finish(llm, disturbed, 6)
        ledger, cap = llm.runtime.ledger, llm.plan.device("cpu").cap
        weights, resident = reserved(llm, "weights"), resident_bytes()[0]
        ledger.set_cap("cpu", cap - ledger.free("cpu") - llm.runtime.pool.nbytes - weights // 3)
        finish(llm, disturbed, 6)
        assert ledger.free("cpu") >= 0
        assert reserved(llm, "weights") < 0.7 * weights
        assert resident - resident_bytes()[0] > weights // 4
        assert "layers" in llm.engine.counters().pressure
        finish(llm, disturbed, 6)
        ledger.set_cap("cpu", cap)
        llm.runtime.pressure.patience = 0.0
        while llm.runtime.pressure.reduced:
            llm.runtime.pressure._next = 0.0
            finish(llm, disturbed, 1)
            llm.runtime.poll()
        assert reserved(llm, "weights") == weights
        finish(llm, disturbed)
        assert list(disturbed.values()) == list(undisturbed.values())


@pytest.mark.parametrize(("devices", "host"), [(1, "room"), (1, "none"), (2, "room"), (3, "room")])
def test_layers_of_devices_move_to_the_host_or_the_file_and_back(model: Path, devices: int, host: str) -> None:
    names = [f"virtual:{i}" for i in range(devices)]
    options = {"device": [f"virtual:{220 // devices}MiB"] * devices, "swap": "0B", "chunk": 16}
    with LLM(model, ctx=128, parallel=8, **options) as llm:  # type: ignore[arg-type]
        ledger, pressure, mover = llm.runtime.ledger, llm.runtime.pressure, llm.runtime.decoder.mover
        undisturbed = add(llm)
        finish(llm, undisturbed)
        disturbed = add(llm)
        finish(llm, disturbed, 6)
        caps = {name: llm.plan.device(name).cap for name in (*names, "cpu")}
        before = {(row.device, row.kind): row.reserved for row in ledger.rows() if row.reserved}
        for name in names:
            layers = mover.needed(mover.places)[name, Kind.WEIGHTS]
            ledger.set_cap(name, caps[name] - ledger.free(name) - before[name, Kind.KV] * 7 // 8 - layers // 3)
        if host == "none":  # but for the buffers that it takes to read layers
            ledger.set_cap("cpu", caps["cpu"] - ledger.free("cpu") + 8 * MIB)
        finish(llm, disturbed, 6)
        assert all(ledger.free(name) >= 0 for name in ledger.names)
        assert {step.device for step in llm.pressure() if step.action == "layers"} >= set(names)
        used = set(mover.places.values())
        assert "stream" in used if host == "room" else "disk" in used
        finish(llm, disturbed, 6)
        for name, cap in caps.items():
            ledger.set_cap(name, cap)
        pressure.patience = 0.0
        while pressure.reduced:
            pressure._next = 0.0
            finish(llm, disturbed, 1)
            llm.runtime.poll()
        assert {(row.device, row.kind): row.reserved for row in ledger.rows() if row.reserved} == before
        assert not mover.streams
        finish(llm, disturbed)
        assert list(disturbed.values()) == list(undisturbed.values())
        backends = llm.runtime.decoder.backends.distinct()
        assert all(b.arena.peak <= b.device.cap for b in backends if isinstance(b, VirtualBackend))
    assert all(row.reserved == 0 for row in ledger.rows() if row.device in names)


def test_layers_move_when_a_device_runs_out_in_a_step(model: Path) -> None:
    with LLM(model, ctx=128, parallel=1, device="virtual:150MiB", swap="0B", chunk=16) as llm:
        runner, free = llm.engine.runner, llm.runtime.ledger.free("virtual:0")
        undisturbed, disturbed = llm.generate("The sea is", PARAMS), dict[int, list[int]]()
        error = BudgetExceeded("no memory", device="virtual:0", nbytes=50 * MIB)
        runner._decoder = RunsOut(runner._decoder, error)
        disturbed[llm.engine.add(llm.tokenizer.encode("The sea is"), PARAMS)[0]] = []
        finish(llm, disturbed)
        assert llm.runtime.ledger.free("virtual:0") >= free + 50 * MIB
        assert "stream" in llm.runtime.decoder.mover.places.values()
        assert list(disturbed.values()) == [undisturbed[0].outputs[0].token_ids]


def reserved(llm: LLM, kind: str) -> int:
    return next(row.actual for row in llm.memory() if (row.device, row.kind) == ("cpu", kind))


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of our own with a limit of 600 MiB, below the one this process is in."""
    for parent in _cgroup_folders("memory")[:1]:
        folder = parent / f"chandra-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        limit = next((folder / n for n in ("memory.max", "memory.limit_in_bytes") if (folder / n).exists()), None)
        try:
            if limit is not None:
                limit.write_text(str(600 * MIB))
                yield folder
                return
        finally:
            folder.rmdir()
    pytest.skip("no cgroup with a memory limit can be made here")


def check(report: dict[str, object]) -> None:
    full, shrunk, again = report["pool"]  # type: ignore[misc]
    assert report["same"]
    assert report["steps"]
    assert report["counters"]
    assert shrunk < full == again
    assert report["available"] >= MARGIN  # type: ignore[operator]
    assert report["given"] > MARGIN  # type: ignore[operator]
    assert not report["reduced"]


def worker(*command: str) -> dict[str, object]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return report


SCRIPT = [sys.executable, str(Path(__file__).parent / "pressure_worker.py")]


def test_a_balloon_in_the_same_cgroup(model: Path, cgroup: Path) -> None:
    enter = f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"'
    check(worker("sh", "-c", enter, "sh", *SCRIPT, str(model), "real"))


def test_a_balloon_whose_bytes_are_counted(model: Path) -> None:
    check(worker(*SCRIPT, str(model), "injected"))
