"""`chandra ps` and `chandra doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from chandra import LLM, SamplingParams
from chandra.memory.running import FOLDER, MemoryRow, Running, StateFile, began, running

ROWS = (MemoryRow("cpu", "weights", 100 << 20, 90 << 20, 95 << 20), MemoryRow("cpu", "all", 3 << 30, 2 << 30, 2 << 30))
HERE = Running(os.getpid(), began(os.getpid()) or 0, "tiny:1b", "Q4_K_M", 4096, 2, 1.0, 2.0, 3, 17, ROWS)


def chandra(*arguments: str, home: Path) -> str:
    environment = {**os.environ, "CHANDRA_HOME": str(home)}
    command = [sys.executable, "-m", "chandra", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=60).stdout


def test_ps_lists_what_runs_and_forgets_what_does_not(tmp_path: Path) -> None:
    here, gone, recycled = (StateFile(tmp_path) for _ in range(3))
    here.tell(lambda: HERE)
    gone.tell(lambda: replace(HERE, pid=(1 << 22) + 1))
    recycled.tell(lambda: replace(HERE, began=HERE.began - 1))
    (tmp_path / FOLDER / "7.0.json").write_text("{half a file")
    lines = chandra("ps", home=tmp_path).splitlines()
    assert len(lines) == 2
    for text in (str(os.getpid()), "tiny:1b", "Q4_K_M", "4096 x 2", "17", "2.00 GiB of 3.00 GiB planned"):
        assert text in lines[1]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert "90.0 MiB" in chandra("ps", "--verbose", home=tmp_path)
    (state,) = json.loads(chandra("ps", "--json", home=tmp_path))
    assert state["rows"][0] == {
        "device": "cpu",
        "kind": "weights",
        "predicted": 100 << 20,
        "actual": 90 << 20,
        "peak": 95 << 20,
    }
    here.remove()
    assert running(tmp_path) == ()


def test_a_state_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    state, told = StateFile(tmp_path), []
    for _ in range(3):
        state.tell(lambda: told.append(1) or HERE)
    assert len(told) == 1
    state.tell(lambda: told.append(1) or HERE, now=True)
    assert len(told) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    StateFile(tmp_path).tell(lambda: HERE)
    assert running(tmp_path) == ()


@pytest.mark.model
def test_a_loaded_model_tells_and_stops_telling(
    model_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_file("smollm2:135m")
    monkeypatch.setenv("CHANDRA_HOME", str(tmp_path))
    with LLM(path, ctx=128) as llm:
        (state,) = running(tmp_path)
        assert (state.pid, state.context, state.rows) == (os.getpid(), 128, state.rows)
        assert {row.kind for row in state.rows} >= {"weights", "kv", "workspace", "runtime", "all", "resident"}
        llm.generate("Hello", SamplingParams(max_tokens=4))
        llm.runtime.tell(now=True)
        assert running(tmp_path)[0].tokens == 4
    assert running(tmp_path) == ()


def test_doctor_shows_kernels_and_limits(tmp_path: Path) -> None:
    told = chandra("doctor", home=tmp_path)
    for text in ("cpu ", "host memory", "gpus", "calibration", "none yet", "linear", "attention", "Q4_K", "panels"):
        assert text in told
