"""`chandra plan`: the table, JSON, exports and exit codes, without a network or a store."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from chandra.cli import main
from chandra.config import Settings
from chandra.planner.actuals import FILE
from chandra.planner.calibrate import known_machine

DEVICES = ("--device", "6GiB", "--host", "32GiB")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No connection can be made, and the calibration of the first test serves all."""

    def refuse(*_: object) -> None:
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("CHANDRA_HOME", str(tmp_path_factory.getbasetemp() / "planner-home"))


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_table_shows_devices_speed_and_what_if(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "llama2:13b", *DEVICES)
    for part in ("gpu:0", "of 6.00 GiB", "weights", "tokens/s", "what if:", "warning: gpu:0: assumed"):
        assert part in text
    assert max(map(len, text.splitlines())) < 140


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(out(capsys, "gemma:2b", "--device", "4GB", "--host", "16GiB", "--ctx", "4096", "--json"))
    assert made["format"] == "Q8_0"
    assert made["workload"]["context"] == 4096
    assert len(made["layers"]) == 18
    assert sum(row["nbytes"] for row in made["predictions"] if row["device"] == "gpu:0") <= 4e9
    assert set(made) == {
        *("model", "format", "convert", "workload", "devices", "embedding", "layers", "head", "kv_type", "block_size"),
        *(
            "num_blocks",
            "swap_bytes",
            "chunk",
            "micro_rows",
            "max_num_seqs",
            "max_logit_rows",
            "multiplies_floats",
            "predictions",
            "loading",
            "speed",
        ),
        *("loading", "speed", "experts", "decisions", "counterfactuals", "warnings"),
    }


def test_exports(capsys: pytest.CaptureFixture[str]) -> None:
    two = ("--device", "rtx4090", "--device", "rtx4090", "--host", "64GiB", "--ctx", "8192", "--quant", "Q4_K_M")
    flags = out(capsys, "qwq:32b", *two, "--export", "llama.cpp").split()
    assert flags[flags.index("-ngl") + 1] == "65"
    assert sum(map(int, flags[flags.index("-ts") + 1].split(","))) == 64
    assert flags[flags.index("-c") + 1] == "8192"
    assert "--pipeline-parallel-size 2" in out(capsys, "qwq:32b", *two, "--export", "vllm")
    modelfile = out(capsys, "llama2:13b", *DEVICES, "--ctx", "4096", "--export", "ollama")
    assert "PARAMETER num_ctx 4096" in modelfile
    layers = next(int(line.split()[2]) for line in modelfile.splitlines() if "num_gpu" in line)
    assert 0 < layers < 40
    document = json.loads(out(capsys, "qwq:32b", *two, "--export", "accelerate"))
    assert document["device_map"]["model.layers.0"] == 0
    assert document["device_map"]["lm_head"] == 1
    assert set(document["max_memory"]) == {"0", "1", "cpu"}


def test_comparison_lists_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    text = out(capsys, "llama2:7b", *DEVICES, "--compare")
    for label in ("F16", "Q8_0", "Q4_K_M", "Q2_K"):
        assert f"{label} " in text


@pytest.mark.model
def test_a_file_is_read_to_see_how_fast_its_pages_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model_file: Callable[[str], Path]
) -> None:
    asked = [str(model_file("smollm2:135m")), "--host", "90MiB", "--ctx", "256", "--disk", "1GiB", "--json"]
    usual = json.loads(out(capsys, *asked))
    assert "disk" in {part["placement"] for part in usual["layers"]}
    monkeypatch.setattr("chandra.cli.plan.cached_rate", lambda checkpoint: 1e6 * (len(checkpoint.tensors) > 0))
    assert json.loads(out(capsys, *asked))["speed"]["decode"] < usual["speed"]["decode"] / 10


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama2:13b", "--host", "2GiB"]) == 3
    assert "it would" in capsys.readouterr().err
    assert main(["plan", "llama2:13b", "--host", "lots"]) == 2
    assert main(["plan", "llama2:13b", *DEVICES, "--ctx", "999999"]) == 2
    assert main(["plan", "no-such-model"]) == 1


def test_a_calibration_is_kept(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    first = known_machine(settings)
    assert first.measured
    assert all(rate.bandwidth > 1e8 and rate.macs > 1e8 for _, rate in first.host.rates)
    assert known_machine(settings) == first
    stored = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(stored | {"machine": {}, "actuals": {"base": {}}}))
    known_machine(settings)
    again = json.loads((tmp_path / FILE).read_text())
    assert again["machine"] == stored["machine"]
    assert "actuals" not in again
