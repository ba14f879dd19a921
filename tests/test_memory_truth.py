"""Real models take the memory that was planned: each device by kind, and the process as the system counts it.

Every case is a process of its own, which fills its context and chooses tokens in the costliest way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chandra import LLM, SamplingParams
from chandra.config import Settings
from chandra.errors import BudgetExceeded
from chandra.planner import calibrate, kernels

pytestmark = pytest.mark.model

MEASURE = """
import json, re, sys
import numpy as np
from chandra import LLM, SamplingParams
from chandra.backends.cpu import _cpu
from chandra.checkpoint import open_checkpoint
from chandra.memory.host import peak_resident
from chandra.planner import plannable
from chandra.planner.kernels import BuiltKernels
from chandra.runtime import _limits

path, options = sys.argv[1], json.loads(sys.argv[2])

def loading(sizes, on_host):  # bytes at the highest while loading, those of virtual devices with the rest
    steps, held, peak = [], 0, 0
    for tensor in sizes.tensors:
        here = tensor.mapped and tensor.part in on_host
        steps.append((0 if here else tensor.nbytes, 0 if here else tensor.host))
    for passing, kept in sorted(steps, key=lambda step: -step[0]):
        held += kept
        peak = max(peak, held + passing)
    return peak

def in_memory(file):  # bytes of its pages
    mapped, nbytes = "", 0
    for line in open("/proc/self/smaps"):
        if found := re.match(r"[0-9a-f]+-[0-9a-f]+ \\S+ \\S+ \\S+ \\S+ +(.*)", line):
            mapped = found[1]
        elif line.startswith("Rss:") and mapped == str(file.resolve()):
            nbytes += int(line.split()[1]) << 10
    return nbytes

rng = np.random.default_rng(0)

def prompts(count, length):
    return [rng.integers(1000, 20000, length).tolist() for _ in range(count)]

with LLM(path, **options) as llm:
    runtime, w, most = llm.runtime, llm.plan.workload, llm.plan.max_num_seqs
    before = in_memory(runtime.stored.path)  # of these the process was found with
    params = SamplingParams(typical_p=0.9, max_tokens=6, ignore_eos=True, logprobs=2)
    llm.generate(prompts(w.parallel, w.context - 6), params)
    llm.generate(prompts(most, w.context * w.parallel // most - 16), params)
    llm.generate(prompts(most, llm.plan.chunk // most), params)  # all of them in one step
    peak = peak_resident()
    backends = {b.device.name: b for b in runtime.decoder.backends.distinct()}
    found = {
        "plan": {d.name: llm.plan.predicted(d.name) for d in llm.plan.devices},
        "highest": {d.name: runtime.ledger.highest(d.name) for d in llm.plan.devices},
        "arenas": {name: b.arena.peak for name, b in backends.items() if hasattr(b, "arena")},
        "rows": [(r.device, r.kind, r.predicted, r.peak) for r in llm.memory()],
        "scratch": (BuiltKernels().scratch_bytes(runtime.spec, _limits(llm.plan)), _cpu.scratch_held()),
        "touched": in_memory(runtime.stored.path) - before,
        "peak": peak,
    }
checkpoint = open_checkpoint(runtime.stored.path)
sizes = plannable(llm.name, runtime.spec, checkpoint).variants[0]
on_host = {part.name for part in llm.plan.parts() if part.placement == "host"}
print(json.dumps(found | {"loading": loading(sizes, on_host)}))
"""

SLACK = 12 << 20  # bytes: what any process is planned to take weighs more than 5 % of the smallest

ONE: dict[str, Any] = {"ctx": 256, "parallel": 1}
TWO = {"ctx": 256, "parallel": 2, "device": ["virtual:600MiB"]}
QUICK = [("smollm2:135m", ONE), ("gemma3:270m", TWO), ("qwen2.5-coder:0.5b", ONE)]
LAYERS = {"smollm2:135m": (10, 20), "gemma3:270m": (6, 12), "qwen2.5-coder:0.5b": (8, 16)}


def ranges(name: str, devices: int) -> dict[str, Any]:
    """Options that put the layers on so many virtual devices; the last layers stay on the host."""
    if not devices:
        return {}
    each = LAYERS[name][0]
    spans = [f"virtual:{i}={i * each}-{(i + 1) * each - 1}" for i in range(devices)]
    return {"device": ["virtual:700MiB"] * devices, "layers": spans}


MATRIX = [
    (name, {"ctx": ctx, "parallel": parallel} | ranges(name, devices))
    for name in LAYERS
    for ctx, parallel in ((512, 1), (2048, 1), (1024, 4))
    for devices in (0, 1, 2, 3)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a calibration, which the runs of these tests correct."""
    folder = tmp_path_factory.mktemp("home")
    calibrate(Settings(home=folder, threads=2), quick=True)
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_memory_is_as_planned(
    name: str, options: dict[str, Any], model_file: Callable[[str], Path], home: Path
) -> None:
    command = [sys.executable, "-c", MEASURE, str(model_file(name)), json.dumps(options)]
    environment = {**os.environ, "CHANDRA_THREADS": "2", "CHANDRA_HOME": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {(device, kind): (predicted, peak) for device, kind, predicted, peak in found["rows"]}
    for (device, kind), (predicted, peak) in rows.items():
        if kind != "resident":
            assert 0.97 * predicted <= peak <= predicted, (device, kind, predicted, peak)
    for device, predicted in found["plan"].items():
        assert 0.97 * predicted <= found["highest"][device] <= predicted, device
    for device, peak in found["arenas"].items():
        assert 0.97 * found["plan"][device] <= peak <= found["plan"][device], device
    promised, held = found["scratch"]
    assert 0.3 * promised <= held <= promised
    planned = resident(rows, found)
    print(f"{name} {options}: resident {found['peak'] / 2**20:.0f} of {planned / 2**20:.0f} MiB")
    assert planned - max(0.05 * planned, SLACK) <= found["peak"] <= planned


def resident(rows: dict[tuple[str, str], tuple[int, int]], found: dict[str, Any]) -> int:
    """Bytes of the process at the highest, by the plan: the host's rows, and those of virtual devices, which are there.

    Swap space is untouched unless sequences are swapped; of the rows in the file only those are there that were used.
    """
    kept = sum(
        predicted
        for (_, kind), (predicted, _) in rows.items()
        if kind not in ("all", "resident", "loading", "swap", "page cache")
    )
    used = found["touched"] if ("cpu", "page cache") in rows else 0
    return max(kept + used, rows["cpu", "runtime"][0] + found["loading"])


def test_more_scratch_than_was_planned_is_an_error(
    model_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(model_file("smollm2:135m"), ctx=128) as llm:
        llm.generate("Hello", SamplingParams(max_tokens=2))
        monkeypatch.setattr(kernels, "_promised", 1000)
        with pytest.raises(BudgetExceeded, match=r"of workspace, 1000 B were planned"):
            llm.runtime.tell(now=True)
