"""The script for a machine with a GPU, on tiny shapes in Triton's interpreter, and the plans of its true shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import counting
import pytest

from chandra.bench import gpu, speed, synthetic
from chandra.engine import Pressure
from chandra.errors import BudgetExceeded, UsageError
from chandra.memory.ledger import Kind

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities that the kernels mask


def run(out: Path, *more: str) -> int:
    return gpu.main(["gpu", "--tiny", "--device", "cpu", "--out", str(out), *more])


def result(out: Path, part: str) -> Any:
    document = json.loads((out / f"{part}.json").read_text())
    assert document["torch"]
    assert document["date"]
    return document["result"]


def part(*names: str) -> list[str]:
    return [word for name in names for word in ("--part", name)]


def test_checks_and_a_streamed_model_run_and_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streamed = "speed tiny Q8_0 0GiB stream"
    assert run(tmp_path, *part("device", "kernels", "equality", streamed, "peer llama")) == 0
    found = result(tmp_path, "kernels")
    assert len(found["checks"]) > 5
    assert not found["failed"]
    assert result(tmp_path, "equality")["equal"]
    case = result(tmp_path, streamed)
    assert case["layers"] == {"stream": 3}
    assert case["decode 1"]["of link"] > 0
    memory = case["memory"]["cuda:0"]
    assert memory["peak"] == memory["planned"] <= memory["cap"]
    for name in gpu.parts(gpu.Bench(tmp_path, True, True, None, 0)):
        (tmp_path / f"{name}.json").touch()
    if importlib.util.find_spec("llama_cpp") is None:
        assert "not installed" in result(tmp_path, "peer llama.cpp")["error"]
    for name in ("peer transformers bf16", "peer transformers nf4"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"part": name, "result": {"error": "none"}}))
    for case in gpu.TINY[:2]:
        (tmp_path / f"speed {case.name}.json").write_text(json.dumps({"part": case.name, "result": {"error": "none"}}))
    capsys.readouterr()
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert " s\n" not in out  # nothing has run
    assert "% link" in out


@pytest.mark.slow
def test_all_parts_run(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    for case, placed in zip(gpu.TINY, ({"resident": 3}, {"host": 1, "resident": 2}, {"stream": 3}), strict=True):
        found = result(tmp_path, f"speed {case.name}")
        assert found["layers"] == placed
        assert found["prefill 16"]["tokens/s"] > 0
        assert len(found["memory"]) == len(case.caps)
    assert result(tmp_path, "peer transformers bf16")["decode 1"]["tokens/s"] > 0


SOME = [*gpu.TINY, *gpu.CASES[2:6]]
REST = [pytest.param(case, marks=pytest.mark.slow) for case in gpu.CASES if case not in SOME]


@pytest.mark.parametrize("case", [*SOME, *REST], ids=lambda case: case.name)
def test_true_shapes_are_planned_and_counted_to_the_byte(case: gpu.Case, tmp_path: Path) -> None:
    """A mistake in shapes, caps or in what is reserved shows without a GPU."""
    bench = gpu.Bench(tmp_path, case in gpu.TINY, True, None, time.monotonic())
    made, spec = bench.plan(case)
    loaded = counting.load(made, spec)
    assert not counting.difference(loaded)
    if case.modes == ("stream",):
        assert any(one.placement == "stream" for one in made.layers)
    assert {one.device for one in made.layers} >= {f"cuda:0{'/1' * i}" for i in range(len(case.caps))}
    loaded.resources.close()


def test_a_context_is_counted_as_measured_and_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu.Bench(tmp_path, True, True, None, time.monotonic())
    for nbytes in (300 << 20, 500 << 20):
        monkeypatch.setattr(counting.CountingBackend, "context_bytes", lambda _, nbytes=nbytes: nbytes)
        loaded = counting.load(*bench.plan(gpu.TINY[0]))
        rows = {row.device: row for row in loaded.ledger.rows() if row.kind is Kind.RUNTIME}
        assert rows["cuda:0"].reserved == rows["cuda:0"].peak == nbytes
        loaded.resources.close()
    with pytest.raises(BudgetExceeded, match=r"cuda:0: .* more for runtime") as raised:  # this cap leaves no room
        counting.load(*bench.plan(gpu.TINY[1]))
    assert "runtime" in raised.value.table


def test_a_full_logical_device_gives_way_alone(tmp_path: Path) -> None:
    bench = gpu.Bench(tmp_path, True, True, None, time.monotonic())
    loaded = synthetic.load(*bench.plan(gpu.TINY[0]), bench.make)
    before = {row.device: row.reserved for row in loaded.ledger.rows() if row.kind is Kind.KV}
    pressure = Pressure(loaded.engine, loaded.decoder, loaded.ledger, 0)
    steps = pressure.relieve("cuda:0/1", 1, last_resort=True)
    after = {row.device: row.reserved for row in loaded.ledger.rows() if row.kind is Kind.KV}
    assert [step.device for step in steps] == ["cuda:0/1"]
    assert after["cuda:0/1"] < before["cuda:0/1"]
    assert after["cuda:0"] == before["cuda:0"]
    loaded.resources.close()


def test_time_that_is_up_ends_a_measurement_and_leaves_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--part", "device", "--part", "speed", "--seconds", "-1") == 0
    assert "out of time" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    bench = gpu.Bench(tmp_path, True, True, None, time.monotonic())
    loaded = counting.load(*bench.plan(gpu.TINY[1]))
    bounds = {"copy": 1.0, "link": 1.0, "matmul": 1.0}
    found = speed.measure(loaded, bounds, (1,), (16,), time.monotonic() - 1)
    assert "decode 1" not in found
    assert not loaded.engine.has_work()
    loaded.resources.close()


def test_real_shapes_are_not_interpreted_and_parts_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="days"):
        gpu.main(["gpu", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="no part"):
        run(tmp_path, "--part", "coffee")


def test_the_command_interprets_kernels_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chandra.bench", "gpu", "--tiny", "--device", "cpu", "--part", "kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 checks, 0 failed" in done.stdout
