"""Speed of weights that are not where they are computed: predicted against measured, and what a link allows.

    python benchmarks/placement.py smollm2:135m qwen2.5-coder:0.5b --out results/placement.json

For each model: in host memory; within a third of its size, the rest read from its file; a fifth to all of its layers
streamed over a simulated link; and what the planner does by itself with that link. Each case is a process of its own,
so that its memory is what it says. Run `chandra calibrate` first, on a quiet machine: the predictions are no better
than the calibration. `--link 0.25GB/s --bandwidth 1GB/s` looks at the overlap alone: little is left to the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from chandra import LLM, SamplingParams
from chandra.checkpoint import open_checkpoint
from chandra.config import Settings
from chandra.errors import DoesNotFit
from chandra.memory.device import parse_rate
from chandra.models import read_spec
from chandra.planner import PlanRequest, discover, plan, plannable
from chandra.store import Store

PROMPT, TOKENS, CONTEXT = "The history of the sea begins with", 48, 512
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)  # of the layers
PROCESS = 120 << 20  # bytes that a process needs beside a model, roughly


def run(model: str, modes: str, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One case. `modes`: the ways to offload that may be used, all of them if empty."""
    if modes:
        constraints = PlanRequest.constraints
        allowed = tuple(modes.split(","))
        PlanRequest.constraints = lambda self: replace(constraints(self), modes=allowed)  # type: ignore[method-assign]
    with LLM(model, ctx=CONTEXT, **options) as llm:
        plan, params = llm.plan, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        llm.generate(PROMPT, params)
        speeds = []
        for _ in range(rounds):
            arrived = [time.perf_counter() for _ in llm.stream(PROMPT, params)]
            speeds.append((len(arrived) - 1) / (arrived[-1] - arrived[0]))
        rows = {row.kind: row for row in llm.memory() if row.device == "cpu"}
        streamed = sum(part.nbytes for part in plan.layers if part.placement == "stream")
        measured = median(speeds)
        return {
            "placements": Counter(f"{part.placement} {part.device}" for part in plan.parts()),
            "predicted": plan.speed.decode,
            "measured": measured,
            "rounds": speeds,
            "error": plan.speed.decode / measured - 1,
            "streamed": streamed,
            "resident_peak": rows["resident"].peak,
            # the memory of virtual devices is this process's, too
            "resident_predicted": sum(plan.predicted(d.name) for d in plan.devices if d.kind in ("cpu", "virtual")),
        }


def cases(path: Path, speed: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The options of each case; `speed`: of the virtual device."""
    size = path.stat().st_size
    third = {"third": ("", {"budget": str(size // 3), "disk": str(size)})} if size // 3 > PROCESS else {}
    devices = {share: {"device": f"virtual:{smallest(path, share, speed)},{speed}"} for share in SHARES}
    streamed = {f"stream {share:.0%}": ("stream", device) for share, device in devices.items()}
    return {"host": ("", {}), **third, **streamed, "planned": ("", devices[0.6])}


def smallest(path: Path, share: float, speed: str) -> int:
    """Bytes of the smallest virtual device for which no more than this share of the layers is streamed."""
    checkpoint, settings = open_checkpoint(path), Settings.from_env()
    spec = read_spec(checkpoint)
    model, low, high = plannable(path.name, spec, checkpoint), 0, 2 * path.stat().st_size
    while high - low > 1 << 18:
        middle = (low + high) // 2
        request = PlanRequest(device=(f"virtual:{middle},{speed}",), ctx=CONTEXT)
        devices, machine = discover(request, settings, spec.vocab_size)
        try:
            made = plan(model, devices, machine, replace(request.constraints(), modes=("stream",)))
            fits = sum(part.placement == "stream" for part in made.layers) <= share * spec.num_layers
        except DoesNotFit:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    checkpoint.close()
    return high


def measure(model: str, modes: str, options: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A case in a process of its own."""
    call = [sys.executable, __file__, model, "--case", json.dumps([modes, options]), "--rounds", str(rounds)]
    result: dict[str, Any] = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", default="2GB/s", help="of the virtual device")
    parser.add_argument("--bandwidth", default="100GB/s", help="of its memory")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        modes, options = json.loads(arguments.case)
        print(json.dumps(run(arguments.models[0], modes, options, arguments.rounds)))
        return
    settings, results, link = Settings.from_env(), {}, parse_rate(arguments.link)
    speed = f"link={arguments.link},bw={arguments.bandwidth}"
    for model in arguments.models:
        path = Store(settings.home, settings.registry).get(model).path
        results[model] = {}
        for name, (modes, options) in cases(path, speed).items():
            case = results[model][name] = measure(model, modes, options, arguments.rounds)
            case["of_link"] = case["measured"] * case["streamed"] / link
            of_link = f", {case['of_link']:.0%} of the link" if case["streamed"] else ""
            where = ", ".join(f"{n} {place}" for place, n in case["placements"].items())
            print(
                f"{model:18} {name:11} {case['measured']:6.1f} tok/s, predicted {case['predicted']:6.1f} "
                f"({case['error']:+.0%}){of_link}; peak {case['resident_peak'] / 1e6:.0f} MB of "
                f"{case['resident_predicted'] / 1e6:.0f}; {where}",
                flush=True,
            )
    if arguments.out:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = {"system": platform.platform(), "processor": platform.processor()}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        document = {
            "date": date,
            "commit": commit,
            "machine": machine,
            "device": speed,
            "units": "tokens/s; bytes",
            "models": results,
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
