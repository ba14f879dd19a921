"""Chandra against llama.cpp on this CPU: alternating processes, ratios of medians, error, JSON, a table and a plot.

    pip install '.[bench]'
    pip install llama-cpp-python==0.3.36      # compiles for some minutes; in any environment
    python benchmarks/compare_cpu.py --peer-python PYTHON --out result.json name=model.gguf …

Run it on an otherwise idle machine, with the package installed (its bytecode is then compiled, as the peer's is).
Ratios above 1 mean that Chandra is faster (load and memory: below 1 is better).
The error is the mean Kullback-Leibler divergence of the next token's distribution from that of the dequantized
weights in float32 (transformers), over a text. `benchmarks/random_model.py` makes larger models to measure.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TEXT = HERE.parent / "tests" / "data" / "prose.txt"
SCORED = 256  # tokens of the text whose predictions are compared
PEER = "llama-cpp-python 0.3.36"
Samples = dict[str, list[float]]


def _run(prompt: int, tokens: int, *names: str, sequences: int = 1) -> dict[str, Any]:
    return {"prompt": prompt, "sequences": sequences, "tokens": tokens, "names": names}


# Peak memory is that of the usual process, with a single sequence.
SINGLE = [
    _run(16, 64, "decode"),
    _run(128, 0, "prefill 128"),
    _run(512, 0, "prefill 512"),
    _run(2048, 32, "prefill 2048", "decode at 2k"),
]
LONG = [_run(8100, 32, "decode at 8k")]
MANY = [_run(32, 32, f"decode x{n}", sequences=n) for n in (2, 4, 8, 16)]
PHASES = {  # runs, sequences, context
    "load": ([], 1, 2560),
    "single": (SINGLE, 1, 2560),
    "many": (MANY, 16, 128),
    "long": (LONG, 1, 8192),
}


def work(python: str, engine: str, task: dict[str, Any]) -> dict[str, float]:
    """One process; its measurements by name."""
    command = [python, str(HERE / "cpu_worker.py"), engine]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} failed on {task['path']}:\n{done.stderr[-2000:]}")
    return {name: value for line in done.stdout.splitlines() for name, value in json.loads(line).items()}


def schedule(phases: list[str], rounds: int) -> list[tuple[int, str]]:
    """(round, phase) in order. The long contexts take minutes: they are measured in the first round only."""
    return [(index, phase) for index in range(rounds) for phase in phases if phase != "long" or index == 0]


def measure(
    path: str, pythons: dict[str, str], steps: list[tuple[int, str]], threads: int, show: Progress
) -> dict[str, Samples]:
    samples: dict[str, Samples] = {engine: {} for engine in pythons}
    for index, phase in steps:
        runs, sequences, ctx = PHASES[phase]
        task = {"path": path, "ctx": ctx, "threads": threads, "sequences": sequences, "runs": runs}
        for engine, python in pythons.items():
            show.step(f"round {index + 1}, {phase}, {engine}")
            for name, value in work(python, engine, task).items():
                if name not in ("load", "memory") or (name, phase) in (("load", "load"), ("memory", "single")):
                    samples[engine].setdefault(name, []).append(value)
    return samples


def errors(path: str, pythons: dict[str, str], threads: int, show: Progress) -> dict[str, dict[str, float]]:
    """Mean divergence from float32, and how often the likeliest token is the same. Empty without transformers."""
    from chandra.checkpoint import open_checkpoint
    from chandra.text import load_tokenizer

    checkpoint = open_checkpoint(path)
    ids = list(load_tokenizer(checkpoint).encode(TEXT.read_text()))[:SCORED]
    checkpoint.close()
    logprobs = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, python in {"float32": sys.executable, **pythons}.items():
            show.step(f"error, {engine}")
            out = f"{folder}/{engine}.npy"
            task = {"path": path, "ctx": 512, "threads": threads, "sequences": 1, "score": ids, "out": out}
            work(python, engine, task)
            logprobs[engine] = np.load(out)
    exact = logprobs.pop("float32").astype(np.float64)
    return {
        engine: {
            "kl": float((np.exp(exact) * (exact - q)).sum(1).mean()),
            "same_top": float((exact.argmax(1) == q.argmax(1)).mean()),
        }
        for engine, q in logprobs.items()
    }


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


class Progress:
    """One line on stderr: how far, what now, how long still."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.started = steps, 0, time.monotonic()

    def step(self, what: str) -> None:
        spent = time.monotonic() - self.started
        left = f", about {spent / self.done * (self.steps - self.done) / 60:.0f} min left" if self.done else ""
        print(f"\r\033[K[{self.done + 1}/{self.steps}] {what}{left}", end="", file=sys.stderr, flush=True)
        self.done += 1


def report(name: str, result: dict[str, Any]) -> Iterator[str]:
    yield f"\n{name:<16} {'chandra':>12} {'llama.cpp':>12} {'ratio':>7}  spread"
    for row in result["rows"]:
        scale = 1e-6 if row["name"] == "memory" else 1
        cells = f"{row['chandra'] * scale:>12.2f} {row['llama.cpp'] * scale:>12.2f} {row['ratio']:>7.2f}"
        yield f"{row['name']:<16} {cells}  {row['lowest']:.2f} … {row['highest']:.2f}"
    if result["errors"]:
        cells = " ".join(f"{result['errors'][engine]['kl']:>12.5f}" for engine in ("chandra", "llama.cpp"))
        yield f"{'KL to float32':<16} {cells}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratios as bars with their spread, one colour for each model."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    names = [row["name"] for row in next(iter(results.values()))["rows"]]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(names) + 1.2), layout="constrained")
    height = 0.8 / len(results)
    for index, (model, result) in enumerate(results.items()):
        rows = result["rows"]
        spread = [[r["ratio"] - r["lowest"] for r in rows], [r["highest"] - r["ratio"] for r in rows]]
        places = [i + (index - (len(results) - 1) / 2) * height for i in range(len(rows))]
        axes.barh(places, [r["ratio"] for r in rows], height, xerr=spread, label=model, error_kw={"lw": 0.8})
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), [f"{n} (less is better)" if n in ("load", "memory") else n for n in names])
    axes.invert_yaxis()
    axes.set_xlabel(f"ratio to {PEER}, median and spread over the rounds")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--phases", default=",".join(PHASES), help=f"some of {', '.join(PHASES)}")
    parser.add_argument("--no-error", action="store_true", help="skip the comparison with float32")
    parser.add_argument("--out", type=Path, help="where to write the JSON; the plot goes beside it as .svg")
    arguments = parser.parse_args()
    pythons = {"chandra": sys.executable, "llama.cpp": arguments.peer_python}
    steps = schedule(arguments.phases.split(","), arguments.rounds)
    each = len(steps) * len(pythons) + (0 if arguments.no_error else 3)
    started, results = time.monotonic(), {}
    show = Progress(each * len(arguments.models))
    for model in arguments.models:
        name, _, path = model.partition("=")
        samples = measure(path, pythons, steps, arguments.threads, show)
        wrong = {} if arguments.no_error else errors(path, pythons, arguments.threads, show)
        results[name] = {"rows": table(samples), "errors": wrong, "samples": samples}
        print("\r\033[K", end="", file=sys.stderr)
        print("\n".join(report(name, results[name])), flush=True)
    if arguments.out:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit.stdout.strip(),
            "machine": {"cpu": cpu, "system": platform.platform(), "threads": arguments.threads},
            "peer": PEER,
            "units": "tokens/s; load: seconds; memory: bytes of peak resident memory; kl: nats per token",
            "seconds": round(time.monotonic() - started),
            "models": results,
        }
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
        plot(results, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
