"""Chandra against llama.cpp on this CPU: alternating processes, ratios of medians, JSON and a table.

    pip install llama-cpp-python==0.3.36      # compiles for some minutes; in any environment
    python benchmarks/compare_cpu.py --peer-python PYTHON --out result.json name=model.gguf …

Run it on an otherwise idle machine. Ratios above 1 mean that Chandra is faster (load and memory: below 1 is better).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# name, prompt tokens, sequences, generated tokens
SINGLE = [["decode", 16, 1, 64], ["prefill 128", 128, 1, 0], ["prefill 512", 512, 1, 0], ["decode at 2k", 2000, 1, 32]]
MANY = [[f"decode x{n}", 32, n, 32] for n in (2, 4, 8, 16)]
Samples = dict[str, list[float]]


def run(python: str, engine: str, task: dict[str, Any]) -> dict[str, float]:
    """One process; its measurements by name."""
    done = subprocess.run(
        [python, str(HERE / "cpu_worker.py"), engine],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=True,
    )
    out: dict[str, float] = {}
    for line in done.stdout.splitlines():
        for name, values in json.loads(line).items():
            for kind, value in values.items():
                if kind in ("seconds", "peak") or name.split()[0] == kind:
                    out[name] = value
    return out


def measure(path: str, pythons: dict[str, str], rounds: int, threads: int) -> dict[str, Samples]:
    samples: dict[str, Samples] = {engine: {} for engine in pythons}
    tasks = [(SINGLE, 1, 2560), (MANY, 16, 128)]
    for index in range(rounds):
        for runs, sequences, ctx in tasks:
            task = {"path": path, "ctx": ctx, "threads": threads, "sequences": sequences, "runs": runs}
            for engine, python in pythons.items():
                print(f"\r{Path(path).name}: round {index + 1} of {rounds}, {engine}      ", end="", file=sys.stderr)
                for name, value in run(python, engine, task).items():
                    if sequences == 1 or name.startswith("decode x"):
                        samples[engine].setdefault(name, []).append(value)
    print(file=sys.stderr)
    return samples


def table(samples: dict[str, Samples]) -> list[dict[str, Any]]:
    """Medians, and the ratio with its spread over the rounds."""
    ours, theirs = samples["chandra"], samples["llama.cpp"]
    rows = []
    for name in ours:
        ratios = [a / b for a, b in zip(ours[name], theirs[name], strict=True)]
        rows.append(
            {
                "name": name,
                "chandra": statistics.median(ours[name]),
                "llama.cpp": statistics.median(theirs[name]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    pythons = {"chandra": sys.executable, "llama.cpp": arguments.peer_python}
    started, results = time.monotonic(), {}
    for model in arguments.models:
        name, _, path = model.partition("=")
        samples = measure(path, pythons, arguments.rounds, arguments.threads)
        results[name] = {"rows": table(samples), "samples": samples}
        print(f"\n{name:<14} {'chandra':>12} {'llama.cpp':>12} {'ratio':>7}  spread")
        for row in results[name]["rows"]:
            scale = 1e-6 if row["name"] == "memory" else 1
            cells = f"{row['chandra'] * scale:>12.2f} {row['llama.cpp'] * scale:>12.2f} {row['ratio']:>7.2f}"
            print(f"{row['name']:<14} {cells}  {row['lowest']:.2f} … {row['highest']:.2f}", flush=True)
    if arguments.out:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "machine": {"cpu": cpu, "system": platform.platform(), "threads": arguments.threads},
            "peer": "llama-cpp-python 0.3.36",
            "units": "tokens/s; load: seconds; memory: bytes of peak resident memory",
            "seconds": round(time.monotonic() - started),
            "models": results,
        }
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
