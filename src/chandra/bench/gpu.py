"""All that is to be checked and measured on a GPU, in parts that can be resumed: each leaves a JSON file.

With `--tiny --device cpu` the same script runs in Triton's interpreter, on small shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from triton import knobs

from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.backend import CudaBackend
from chandra.bench import checks, peers, speed, synthetic
from chandra.config import SamplingParams
from chandra.errors import ChandraError, UsageError
from chandra.lazy import torch
from chandra.llm import LLM
from chandra.memory.device import Device, format_size
from chandra.memory.host import memory_available
from chandra.planner import ASSUMED_HOST, Constraints, machine_with
from chandra.planner.placement import Mode

GIB = 1 << 30
Run = tuple[str, str, tuple[int, ...], tuple[Mode, ...]]  # model, format, GiB of each logical device, ways to offload
SPEED: tuple[Run, ...] = (
    ("llama-2-7b", "Q4_K_M", (6,), ("host",)),
    ("llama-2-7b", "Q8_0", (16,), ("host",)),
    ("llama-2-13b", "Q4_K_M", (16,), ("host",)),
    ("gemma-2b", "Q4_K_M", (4,), ("host",)),
    ("mistral-7b", "nf4", (8,), ("host",)),
    ("llama-2-7b", "F16", (20,), ("host",)),
    ("qwen2.5-32b", "Q4_K_M", (24, 24), ("host",)),
)
OFFLOAD: tuple[Run, ...] = (
    ("llama-2-13b", "Q4_K_M", (6,), ("stream",)),
    ("llama-2-13b", "Q4_K_M", (6,), ("host",)),
    ("llama-2-7b", "Q4_K_M", (4,), ("host", "stream")),
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One run. `tiny`: small shapes; `interpret`: on torch's CPU."""

    out: Path
    tiny: bool
    interpret: bool
    model: Path | None
    until: float  # time.monotonic of the end

    def device(self, cap: int, index: int = 0) -> Device:
        return Device(f"cuda:0/{index}" if index else "cuda:0", "cuda", cap)

    def backend(self, cap: int = 12 * GIB) -> CudaBackend:
        accelerator = Accelerator() if self.interpret else None
        return CudaBackend(self.device(cap), accelerator=accelerator)

    def run(self, case: Run) -> dict[str, Any]:
        """Measure a model in these logical devices of one GPU."""
        name, label, caps, modes = ("tiny", "Q8_0", (1,), case[3]) if self.tiny else case
        bounds = json.loads((self.out / "device.json").read_text())["result"]
        devices = [self.device(cap * GIB, i) for i, cap in enumerate(caps)]
        devices.append(Device("cpu", "cpu", memory_available()))
        prompts, batches = ((16,), (1,)) if self.tiny else ((512, 2048), (1, 8))
        context, parallel, chunk = (24, 1, 16) if self.tiny else (2176, 8, 2048)
        machine = machine_with(ASSUMED_HOST, devices)
        constraints = Constraints(context, parallel, kv_type="f16", chunk=chunk, modes=modes)
        loaded = synthetic.load(synthetic.CONFIGS[name], label, devices, machine, constraints, self.interpret)
        try:
            found = speed.measure(loaded, bounds, batches, prompts)
        finally:
            loaded.resources.close()
            del loaded
            gc.collect()
        return {"model": name, "format": label, "caps": caps, **found}

    def cases(self, runs: tuple[Run, ...]) -> list[dict[str, Any]]:
        """One after another while there is time; what cannot run says why."""
        out: list[dict[str, Any]] = []
        for case in runs[:1] if self.tiny else runs:
            if time.monotonic() > self.until:
                out.append({"model": case[0], "format": case[1], "skipped": "out of time"})
                continue
            try:
                out.append(self.run(case))
            except ChandraError as error:
                out.append({"model": case[0], "format": case[1], "caps": case[2], "error": str(error)})
        return out


def device(bench: Bench) -> Any:
    backend = bench.backend()
    nbytes, width = (1 << 20, 128) if bench.tiny else (1 << 30, 8192)
    name = "interpreter" if bench.interpret else torch.cuda.get_device_name(0)
    return {"name": name, "torch": torch.__version__, **speed.rates(backend, nbytes, width)}


def kernels(bench: Bench) -> Any:
    backend = bench.backend()
    found = checks.check_linears(backend, bench.tiny) + checks.check_attention(backend, bench.tiny)
    return {"checks": found, "failed": [f for f in found if not f["error"] < checks.LIMIT]}


def equality(bench: Bench) -> Any:
    """Greedy tokens of a model on the GPU and on the CPU."""
    texts: list[Any] = []
    if bench.model is None:
        devices = [bench.device(GIB), Device("cpu", "cpu", GIB)]
        for some in (devices, devices[1:]):
            limits = Constraints(context=32, parallel=1, chunk=16)
            loaded = synthetic.load(
                synthetic.CONFIGS["tiny"], "Q8_0", some, machine_with(ASSUMED_HOST, some), limits, bench.interpret
            )
            texts.append(speed.greedy(loaded, [5, 9, 11, 3], 4))
            loaded.resources.close()
    else:
        params, prompts = SamplingParams(temperature=0, max_tokens=48), ["The sea is", "def add(a, b):"]
        for name in ("cuda:0", "cpu"):
            with LLM(str(bench.model), device=name, ctx=512) as llm:
                texts.append([r.outputs[0].token_ids for r in llm.generate(prompts, params)])
    return {"gpu": texts[0], "cpu": texts[1], "equal": texts[0] == texts[1]}


def peer(bench: Bench) -> Any:
    out: dict[str, Any] = {}
    name, where = ("tiny", "cpu") if bench.tiny else ("llama-2-7b", "cuda:0")
    rates: dict[str, Callable[[], Any]] = {"transformers bf16": lambda: peers.transformers_rates(name, False, where)}
    if peers.available("bitsandbytes") and not bench.interpret:
        rates["transformers nf4 (bitsandbytes)"] = lambda: peers.transformers_rates(name, True, where)
    if peers.available("llama_cpp") and bench.model is not None:
        path = bench.model
        rates["llama.cpp"] = lambda: peers.llama_cpp_rates(path)
    for engine, run in rates.items():
        try:
            out[engine] = run()
        except Exception as error:
            out[engine] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
    return out


PARTS: dict[str, Callable[[Bench], Any]] = {
    "device": device,
    "kernels": kernels,
    "equality": equality,
    "speed": lambda bench: bench.cases(SPEED),
    "offload": lambda bench: bench.cases(OFFLOAD),
    "peers": peer,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that have no result yet, or those named, and print a table of all."""
    parser = argparse.ArgumentParser(prog="python -m chandra.bench", description=__doc__)
    parser.add_argument("what", choices=("gpu",))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this part, again (repeatable)")
    parser.add_argument("--model", type=Path, help="a small model file, to compare the GPU with the CPU")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=520, help="begin nothing after so long")
    arguments = parser.parse_args(argv)
    interpret = arguments.device == "cpu"
    if interpret and not arguments.tiny:
        raise UsageError("--device cpu interprets kernels, which takes days on real shapes", "add --tiny")
    if interpret and not knobs.runtime.interpret:
        raise UsageError("--device cpu needs Triton's interpreter", "set TRITON_INTERPRET=1 in the environment")
    arguments.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + arguments.seconds
    bench = Bench(arguments.out, arguments.tiny, interpret, arguments.model, until)
    wanted = arguments.part or [name for name in PARTS if not (bench.out / f"{name}.json").exists()]
    for name in wanted:
        if time.monotonic() > until:
            print(f"{name}: out of time; run again to go on")
            continue
        began = time.monotonic()
        result = PARTS[name](bench)
        document = {"part": name, "seconds": round(time.monotonic() - began, 1), "result": result}
        (bench.out / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"{name}: {document['seconds']} s", flush=True)
    print(table(bench.out))
    return 0


def table(folder: Path) -> str:
    """All results in a few lines."""
    parts = {p.stem: json.loads(p.read_text(encoding="utf-8"))["result"] for p in sorted(folder.glob("*.json"))}
    lines = []
    if bounds := parts.get("device"):
        rates = [f"{key} {bounds[key] / 1e9:.0f} G/s" for key in ("copy", "link", "matmul")]
        lines.append(f"{bounds['name']}: {', '.join(rates)}; context {format_size(bounds['context'])}")
    if found := parts.get("kernels"):
        lines.append(f"kernels: {len(found['checks'])} checks, {len(found['failed'])} failed")
    if found := parts.get("equality"):
        lines.append(f"the GPU says what the CPU says: {found['equal']}")
    for case in parts.get("speed", []) + parts.get("offload", []):
        lines.append(_line(case))
    for engine, rates in parts.get("peers", {}).items():
        lines.append(f"{engine}: {rates.get('error') or round(rates['decode 1']['tokens/s'], 1)}")
    return "\n".join(lines)


def _line(case: dict[str, Any]) -> str:
    head = f"{case['model']:<12} {case['format']:<7} "
    if "memory" not in case:
        return head + str(case.get("skipped") or case.get("error")).splitlines()[0]
    rates = [
        f"{key} {value['tokens/s']:.0f} tok/s ({100 * value.get('of copy', value.get('of matmul', 0)):.0f} %)"
        for key, value in case.items()
        if key.startswith(("decode", "prefill"))
    ]
    memory = [f"{d} {format_size(m['peak'])} of {format_size(m['planned'])}" for d, m in case["memory"].items()]
    return head + "  ".join(rates + memory)
