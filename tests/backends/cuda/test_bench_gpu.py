"""The script for a machine with a GPU, whole, on tiny shapes in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chandra.bench.gpu import main
from chandra.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about infinities that the kernels mask


def run(out: Path, *more: str) -> int:
    return main(["gpu", "--tiny", "--device", "cpu", "--out", str(out), *more])


def result(out: Path, part: str) -> object:
    return json.loads((out / f"{part}.json").read_text())["result"]


def test_all_parts_run_and_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--part", "device", "--part", "kernels") == 0
    found = result(tmp_path, "kernels")
    assert len(found["checks"]) > 5
    assert not found["failed"]
    (tmp_path / "offload.json").write_text('{"result": []}')  # the same again on shapes that fit
    capsys.readouterr()
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "speed: " in out
    assert "device: " not in out  # it was there
    assert result(tmp_path, "equality")["equal"]
    (case,) = result(tmp_path, "speed")
    assert case["decode 1"]["tokens/s"] > 0
    memory = case["memory"]["cuda:0"]
    assert memory["peak"] == memory["planned"] - memory["kinds"]["runtime"] - memory["kinds"]["graphs"]
    assert result(tmp_path, "peers")["transformers bf16"]["decode 1"]["tokens/s"] > 0
    assert "tiny" in out


def test_real_shapes_are_not_interpreted(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="days"):
        main(["gpu", "--device", "cpu", "--out", str(tmp_path)])
