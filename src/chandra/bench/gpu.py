"""All that is to be checked and measured on a GPU, in parts that can be resumed: each leaves a JSON file.

With `--tiny --device cpu` the script runs in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs

from chandra import __version__
from chandra.backends import make_backend
from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.backend import CudaBackend
from chandra.bench import checks, peers, speed, synthetic
from chandra.bench.table import table
from chandra.config import SamplingParams
from chandra.errors import ChandraError, UsageError
from chandra.lazy import torch
from chandra.llm import LLM
from chandra.memory.device import Device
from chandra.memory.host import memory_available
from chandra.memory.ledger import Kind
from chandra.memory.plan import Plan
from chandra.models import ModelSpec
from chandra.ops.contracts import Backend
from chandra.planner import ASSUMED_HOST, Constraints, machine_with
from chandra.planner.placement import Mode

GIB = 1 << 30


class Case(NamedTuple):
    """A model in logical devices of one GPU of so many GiB (0: half a layer too few). `batches`: sequences at
    once; `modes`: how it may be offloaded; `chunk`: tokens of a step; `cut`: layers of each device, if fixed."""

    model: str
    format: str
    caps: tuple[float, ...]
    batches: tuple[int, ...] = (1, 8)
    modes: tuple[Mode, ...] = ("host",)
    chunk: int = 2048
    cut: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model} {self.format} {'+'.join(f'{cap:g}' for cap in self.caps)}GiB {'/'.join(self.modes)}"


CASES = (
    Case("llama-2-7b", "Q4_K_M", (16,)),
    Case("llama-2-7b", "Q8_0", (16,), (1, 4)),
    Case("llama-2-13b", "Q4_K_M", (6,), (1,), ("stream",)),
    Case("llama-2-13b", "Q4_K_M", (16,), (1, 4)),
    Case("llama-2-7b", "F16", (16,), (1,)),
    Case("gemma-2b", "Q4_K_M", (4,)),
    Case("mistral-7b", "nf4", (8,)),
    Case("qwen2.5-32b", "Q4_K_M", (24, 24)),
    Case("llama-2-7b", "Q4_K_M", (6,), (1,)),
    Case("llama-2-13b", "Q4_K_M", (6,), (1,), ("host",), 512),
    Case("llama-2-7b", "Q4_K_M", (4,), (1,), ("stream",)),
)
TINY = (
    Case("tiny", "Q8_0", (1, 1), (1,), chunk=16, cut=(2, 1)),
    Case("tiny", "Q8_0", (0,), (1,), chunk=16),
    Case("tiny", "Q8_0", (0,), (1,), ("stream",), chunk=16),
)


@dataclass(frozen=True)
class Bench:
    """One run. `tiny`: small shapes; `interpret`: on torch's CPU; `until`: of the monotonic clock."""

    out: Path
    tiny: bool
    interpret: bool
    model: Path | None
    until: float

    def device(self, cap: float, index: int = 0) -> Device:
        return Device(f"cuda:0/{index}" if index else "cuda:0", "cuda", int(cap * GIB))

    def make(self, device: Device, **sizes: Any) -> Backend:
        """The backend of a device."""
        if device.kind != "cuda":
            return make_backend(device)
        return synthetic.RepeatingBackend(device, **sizes, accelerator=Accelerator() if self.interpret else None)

    def backend(self) -> CudaBackend:
        return CudaBackend(self.device(12), accelerator=Accelerator() if self.interpret else None)

    @property
    def prompts(self) -> tuple[int, ...]:
        return (16,) if self.tiny else (512, 2048)

    def plan(self, case: Case) -> tuple[Plan, ModelSpec]:
        """Raises DoesNotFit."""
        devices = [self.device(cap or 1, i) for i, cap in enumerate(case.caps)]
        ends = [sum(case.cut[: i + 1]) for i in range(len(case.cut))]
        layers = {d.name: ((end - n, end - 1),) for d, n, end in zip(devices, case.cut, ends, strict=False)}
        devices.append(Device("cpu", "cpu", GIB if self.tiny else 96 * GIB if self.interpret else memory_available()))
        size = max(self.prompts) + (4 if self.tiny else 128), max(case.batches)
        limits = Constraints(*size, kv_type="f16", layers=layers, chunk=case.chunk, modes=case.modes, swap=0)

        def planned() -> tuple[Plan, ModelSpec]:
            machine = machine_with(ASSUMED_HOST, devices)
            return synthetic.planned(synthetic.CONFIGS[case.model], case.format, devices, machine, limits)

        made, spec = planned()
        if not all(case.caps):
            graphs = sum(p.nbytes for p in made.predictions if p.kind == Kind.GRAPHS)
            cap = made.predicted("cuda:0") - graphs - made.layers[0].nbytes // 2
            devices[0] = replace(devices[0], cap=cap)
            made, spec = planned()
        return made, spec

    def measure(self, case: Case) -> Any:
        """Rates and memory of a case. Raises ChandraError, OutOfTime."""
        made, spec = self.plan(case)
        steps = min(speed.LONG, speed.TOKENS / made.speed.decode) * len(case.batches)
        needed = 10 + steps + sum(self.prompts) / made.workload.prompt * made.speed.first_token
        if not self.tiny and time.monotonic() + needed > self.until:
            raise speed.OutOfTime(f"takes {needed:.0f} s")
        loaded = synthetic.load(made, spec, self.make, progress=_say)
        try:
            bounds = json.loads((self.out / "device.json").read_text(encoding="utf-8"))["result"]
            return {**case._asdict(), **speed.measure(loaded, bounds, case.batches, self.prompts, self.until)}
        finally:
            loaded.resources.close()


def device(bench: Bench) -> Any:
    backend = bench.backend()
    nbytes, width = (1 << 20, 128) if bench.tiny else (1 << 30, 8192)
    name = "interpreter" if bench.interpret else torch.cuda.get_device_name(0)
    return {"name": name, **speed.rates(backend, nbytes, width)}


def kernels(bench: Bench) -> Any:
    def told(done: int, total: int) -> None:
        speed.check(bench.until)
        _say("kernels", done, total)

    found = checks.run_all(bench.backend(), bench.tiny, told)
    return {"checks": found, "failed": [f for f in found if not f["error"] < checks.LIMIT]}


def equality(bench: Bench) -> Any:
    """Greedy tokens of a model on the GPU and on the CPU."""
    texts: list[Any] = []
    if bench.model is None:
        for case in (Case("tiny", "Q8_0", (1,), (1,), chunk=16), Case("tiny", "Q8_0", (), (1,), chunk=16)):
            made, spec = replace(bench, tiny=True).plan(case)
            loaded = synthetic.load(made, spec, bench.make)
            texts.append(speed.greedy(loaded, [5, 9, 11, 3], 4))
            loaded.resources.close()
    else:
        params, prompts = SamplingParams(temperature=0, max_tokens=48), ["The sea is", "def add(a, b):"]
        for name in ("cuda:0", "cpu"):
            with LLM(str(bench.model), device=name, ctx=512) as llm:
                texts.append([r.outputs[0].token_ids for r in llm.generate(prompts, params)])
    return {"gpu": texts[0], "cpu": texts[1], "equal": texts[0] == texts[1]}


def parts(bench: Bench) -> dict[str, Callable[[], Any]]:
    """All parts, by the name of their file, in the order of their worth."""
    simple = {"device": device, "kernels": kernels, "equality": equality}
    out: dict[str, Callable[[], Any]] = {name: lambda run=run: run(bench) for name, run in simple.items()}  # type: ignore[misc]
    for case in TINY if bench.tiny else CASES:
        out[f"speed {case.name}"] = lambda case=case: bench.measure(case)  # type: ignore[misc]
    name, where = ("tiny", "cpu") if bench.tiny else ("llama-2-7b", "cuda:0")
    out["peer transformers bf16"] = lambda: peers.transformers_rates(name, False, where)
    out["peer transformers nf4"] = lambda: peers.transformers_rates(name, True, where)
    out["peer llama.cpp"] = lambda: peers.llama_cpp_rates(bench.model)
    return out


def run(bench: Bench, wanted: Iterable[str]) -> None:
    """These parts, while there is time; each result is kept as soon as it is there."""
    every = parts(bench)
    versions = {"chandra": __version__, "torch": torch.__version__, "triton": triton.__version__}
    for name in wanted:
        began, result = time.monotonic(), None
        try:
            speed.check(bench.until)
            result = every[name]()
        except speed.OutOfTime as late:
            print(f"{name}: out of time ({late}); run again to go on", flush=True)
            continue
        except (ChandraError, ImportError, RuntimeError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        finally:
            gc.collect()
            if not bench.interpret:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        seconds = round(time.monotonic() - began, 1)
        about = {"part": name, "seconds": seconds, "date": datetime.now(UTC).isoformat(timespec="seconds"), **versions}
        path = bench.out / f"{name.replace('/', '-')}.json"
        path.write_text(json.dumps(about | {"result": result}, indent=1), encoding="utf-8")
        print(f"{name}: {seconds} s", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that have no result yet, or those named, and print a table of all."""
    parser = argparse.ArgumentParser(prog="python -m chandra.bench", description=__doc__)
    parser.add_argument("what", choices=("gpu",))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", action="append", help="only parts that begin so, again (repeatable)")
    parser.add_argument("--model", type=Path, help="a small model file, to compare the GPU with the CPU and llama.cpp")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=520, help="end after so long")
    arguments = parser.parse_args(argv)
    interpret = arguments.device == "cpu"
    if interpret and not arguments.tiny:
        raise UsageError("--device cpu interprets kernels: days for real shapes", "add --tiny")
    if interpret and not knobs.runtime.interpret:
        raise UsageError("--device cpu needs Triton's interpreter", "set TRITON_INTERPRET=1 in the environment")
    if interpret:
        import chandra.bench.interpreter  # noqa: F401
    arguments.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.seconds
    bench = Bench(arguments.out, arguments.tiny, interpret, arguments.model, until)
    names = [name for name in parts(bench) if name.startswith(tuple(arguments.part or ("",)))]
    if not names:
        raise UsageError(f"no part begins with {' or '.join(arguments.part)}", f"parts: {', '.join(parts(bench))}")
    run(bench, [n for n in names if arguments.part or not (bench.out / f"{n.replace('/', '-')}.json").exists()])
    print(table(bench.out))
    return 0


def _say(phase: str, done: int, total: int) -> None:
    """Where a long wait stands, in at most four lines."""
    if total and done * 4 // total > (done - 1) * 4 // total:
        print(f"  {phase}: {done} of {total}", flush=True)
