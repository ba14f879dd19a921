"""What runs took corrects later plans: towards the truth, never below what was seen, and not by one odd run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chandra.memory.device import Device
from chandra.memory.ledger import Kind, Ledger
from chandra.memory.plan import Plan
from chandra.planner import ASSUMED_HOST, Constraints, observe, plan, plannable_config
from chandra.planner.actuals import FILE, GROWTH, ODD, RECENT, SPAN, Actual, Actuals
from chandra.store import load_catalog, parse_name

MIB = 1 << 20
sizes = st.integers(0, 1 << 32)


@given(st.integers(0, 1 << 28), st.lists(sizes, max_size=RECENT))
@settings(deadline=None)
def test_never_less_than_was_seen_and_odd_runs_do_not_count(assumed: int, seen: list[int]) -> None:
    expected = Actual("", len(seen), tuple(seen)).expected(assumed)
    usual = [n for n in seen if n <= 3 * assumed // 2 + SPAN]
    odd = sorted(set(range(len(seen))) - set(range(len(usual))))
    assert expected >= max(usual, default=0)
    if len(odd) <= ODD:
        assert expected <= max([assumed, *usual])
    else:
        assert expected >= sorted(seen)[-ODD - 1]  # what happens again is true here
    if usual and max(seen) < assumed:
        assert max(seen) <= expected < assumed


def test_notes_are_kept_with_the_calibration_and_end_with_it(tmp_path: Path) -> None:
    Actuals().note(tmp_path, {"base": 5})
    assert not Actuals.read(tmp_path)  # no calibration, nothing to correct
    (tmp_path / FILE).write_text(json.dumps({"figures": 1}))
    for nbytes in range(RECENT + 2):
        Actuals.read(tmp_path).note(tmp_path, {"base": nbytes})
    kept = Actuals.read(tmp_path)["base"]
    assert (kept.count, kept.seen) == (RECENT + 2, tuple(range(2, RECENT + 2)))
    assert json.loads((tmp_path / FILE).read_text())["figures"] == 1
    notes = '{"actuals": {"base": {"date": "2026-01-01", "count": 1, "seen": %s}}}'
    for broken in ("", "[]", '{"actuals": 3}', '{"actuals": {"base": {"seen": ["x"]}}}', notes % "[]", notes % '["x"]'):
        (tmp_path / FILE).write_text(broken)
        assert not Actuals.read(tmp_path)


def test_what_a_process_grows_by_is_only_raised() -> None:
    host, gpu = Device("cpu", "cpu", 1), Device("cuda:0", "cuda", 1)
    for seen in (MIB, GROWTH["cpu"] + MIB):
        actuals = Actuals({"growth cpu": Actual("", 1, (seen,))})
        assert actuals.process([host], MIB, 0) == MIB + max(seen, GROWTH["cpu"])
    assert actuals.process([gpu, host], MIB, 0) > MIB + GROWTH["cuda"]  # not a process of that kind


def test_the_context_of_a_gpu_is_noted_as_the_ledger_has_it(tmp_path: Path) -> None:
    gpus = [Device("cuda:0", "cuda", 1 << 40), Device("cuda:0/1", "cuda", 1 << 40)]
    (tmp_path / FILE).write_text("{}")
    ledger, end = Ledger([*gpus, Device("cpu", "cpu", 1 << 40)]), observe(tmp_path, 100)
    context = ledger.reserve("cuda:0", Kind.RUNTIME, 400 * MIB)
    ledger.reserve("cuda:0/1", Kind.RUNTIME, 0)
    context.resize(300 * MIB)  # measured
    made = plan_of(gpus)
    for _ in range(2):
        end(made, ledger)
    assert Actuals.read(tmp_path)["context cuda:0"].seen == (300 * MIB,) * 2
    assert 300 * MIB < Actuals.read(tmp_path).of("context cuda:0", 400 * MIB) < 360 * MIB
    assert "context cuda:0/1" not in Actuals.read(tmp_path)


def plan_of(gpus: list[Device]) -> Plan:
    devices = [*gpus, Device("cpu", "cpu", 1 << 40)]
    model = plannable_config("gemma:2b", load_catalog().find(parse_name("gemma:2b")).config, "Q8_0")  # type: ignore[union-attr]
    return plan(model, devices, ASSUMED_HOST, Constraints())


RUN = """
import json, sys
import chandra.planner.actuals as actuals
from chandra import LLM, SamplingParams
from chandra.config import Settings
from chandra.planner import PlanRequest, discover
path, before, base, growth = sys.argv[1], *map(int, sys.argv[2:])
actuals.BASE, actuals.GROWTH["cpu"] = base, growth
filled = b"x" * before
with LLM(path, ctx=128) as llm:
    planned = discover(PlanRequest(), settings := Settings.from_env(), llm.runtime.spec.vocab_size)[1].host.runtime
    promised = next(row.predicted for row in llm.memory() if row.kind == "runtime")
    llm.generate("Hello", SamplingParams(max_tokens=4))
    vocabulary = actuals.TOKEN * llm.runtime.spec.vocab_size
with LLM(path, ctx=128) as again:
    pass
notes = actuals.Actuals.read(settings.home)
print(json.dumps([planned, promised, vocabulary, {name: note.seen for name, note in notes.items()}]))
"""


def run(home: Path, path: Path, before: int, base: int, growth: int) -> tuple[int, int, int, dict[str, list[int]]]:
    """One process: the row of a plan for another one, that of its own plan, and all notes after it."""
    command = [sys.executable, "-c", RUN, str(path), str(before), str(base), str(growth)]
    environment = os.environ | {"CHANDRA_HOME": str(home)}
    planned, promised, vocabulary, seen = json.loads(subprocess.check_output(command, env=environment))
    return planned, promised, vocabulary, seen


@pytest.mark.model
@pytest.mark.parametrize(("base", "growth"), [(80 * MIB, 8 * MIB), (24 * MIB, 2 * MIB)])
def test_the_second_plan_is_nearer_to_the_truth(
    base: int, growth: int, tmp_path: Path, model_file: Callable[[str], Path]
) -> None:
    path = model_file("smollm2:135m")
    run(tmp_path, path, 0, base, growth)  # measures the machine
    (tmp_path / FILE).write_text(json.dumps(json.loads((tmp_path / FILE).read_text()) | {"actuals": {}}))
    planned, promised, vocabulary, seen = run(tmp_path, path, 0, base, growth)
    assert len(seen["base"]) == len(seen["growth cpu"]) == 1  # of two runs in one process, the first
    true = seen["base"][0] + vocabulary + seen["growth cpu"][0]
    assert 20 * MIB < true < 80 * MIB
    second, promised_then, *_ = run(tmp_path, path, 0, base, growth)
    assert abs(second - true) < abs(planned - true) - 2 * MIB
    if growth < 3 * MIB:
        assert promised_then > promised


@pytest.mark.model
def test_an_odd_run_does_no_harm(tmp_path: Path, model_file: Callable[[str], Path]) -> None:
    path = model_file("smollm2:135m")
    assumed = 41 * MIB, 8 * MIB
    run(tmp_path, path, 0, *assumed)
    planned, *_ = run(tmp_path, path, 500 * MIB, *assumed)
    after, promised, _, seen = run(tmp_path, path, 0, *assumed)
    assert max(seen["base"]) > 500 * MIB
    assert abs(after - planned) <= 2 * MIB
    assert promised < 100 * MIB
