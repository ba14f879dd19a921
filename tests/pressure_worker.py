"""A process that answers 8 requests while another one takes its memory. Run by `test_pressure.py`.

`python pressure_worker.py MODEL real|injected`: `real` reads the memory that is available from the system (the caller
has put this process into a cgroup); `injected` counts the balloon's resident bytes against a fixed amount.
Prints what happened as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from chandra import LLM, SamplingParams
from chandra.memory.host import memory_available, resident_bytes

MIB = 1 << 20
MARGIN = 24 * MIB
BALLOON = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096]); print(1, flush=1); input()"
THINGS = ("sea", "sun", "sky", "sand", "snow", "storm", "stone", "star")
PROMPTS = [f"Question {i}: what is the {thing}? " + f"The {thing} is large. " * 10 for i, thing in enumerate(THINGS)]
PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def add(llm: LLM) -> dict[int, list[int]]:
    return {llm.engine.add(llm.tokenizer.encode(prompt), PARAMS)[0]: [] for prompt in PROMPTS}


def finish(llm: LLM, texts: dict[int, list[int]], steps: int = 10**6) -> None:
    while llm.engine.has_work() and steps:
        for output in llm.runtime.step():
            assert output.error is None
            texts[output.seq_id] += output.token_ids
        steps -= 1


def resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text() if Path(f"/proc/{pid}").exists() else ""
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def main(model: str, mode: str) -> None:
    with LLM(model, ctx=1024, parallel=8) as llm:
        pressure = llm.runtime.pressure
        pressure.margin, pressure.patience = 0, 0.3
        undisturbed = add(llm)
        finish(llm, undisturbed)
        for start in range(2):  # something to fill the prefix cache with
            llm.generate([list(range(1000 + start, 1900 + start))], SamplingParams(max_tokens=1))
        free = memory_available() if mode == "real" else 400 * MIB
        disturbed = add(llm)
        finish(llm, disturbed, 10)
        before, _ = resident_bytes()
        full = llm.runtime.pool.nbytes
        command = [sys.executable, "-c", BALLOON, str(free - MARGIN // 2 - 8 * MIB)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as balloon:
            assert balloon.stdout is not None
            balloon.stdout.readline()
            given = before - resident_bytes()[0]
            if mode == "injected":
                pressure.available = lambda: free - resident(balloon.pid) + before - resident_bytes()[0]
            pressure.margin, pressure._next = MARGIN, 0.0
            finish(llm, disturbed)
            given = before - resident_bytes()[0]
            steps, low = [str(step) for step in pressure.steps], pressure.available()
            shrunk = llm.runtime.pool.nbytes
            balloon.kill()
        deadline = time.monotonic() + 20
        while pressure.reduced and time.monotonic() < deadline:
            llm.runtime.poll()
            time.sleep(0.05)
        llm.engine.blocks.check_integrity()
        report = {
            "same": list(disturbed.values()) == list(undisturbed.values()),
            "preemptions": llm.engine.counters().preemptions,
            "counters": llm.engine.counters().pressure,
            "steps": steps,
            "given": given,
            "available": low,
            "pool": [full, shrunk, llm.runtime.pool.nbytes],
            "reduced": pressure.reduced,
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
