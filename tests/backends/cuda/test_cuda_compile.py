"""The product kernels compile for GPUs that are not here, and take no more than those have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from chandra.quant import formats


def compiled(names: str, rows: str, capabilities: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("aot_linear.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, str(script), names, rows, capabilities]
    ran = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    figures: list[dict[str, Any]] = json.loads(ran.stdout)
    assert all(figure["shared"] <= figure["limit"] for figure in figures)
    assert all(figure["registers"] > 10 for figure in figures)  # what cannot be compiled may become a trap
    return figures


@pytest.mark.parametrize(
    ("name", "rows", "capability"),
    [("Q8_0", "1", "75"), ("Q4_K", "16", "80"), ("int4-g128", "1,600", "90")],
)
def test_products_compile_for_chips_that_are_not_here(name: str, rows: str, capability: str) -> None:
    figures = compiled(name, rows, capability)
    assert {figure["kernel"] for figure in figures} >= {"product_kernel", "unpack_kernel", "group_kernel"}
    for figure in figures:
        if figure["kernel"] == "product_kernel" and figure["rows"] <= 16 and figure["capability"] >= 80:
            assert figure["local"] <= 64  # registers are not spilled within the loop
            assert figure["registers"] * figure["warps"] * 32 * 6 <= 1 << 16  # enough thread blocks at once


def test_a_rehearsal_compiles_all_kernels_of_a_model_once(tmp_path: Path) -> None:
    script = Path(__file__).with_name("aot_rehearsal.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.replace("(", "[").replace(")", "]"))
    total = told[-1][1]
    assert told == [[i + 1, total] for i in range(total)]
    assert total > 10
    assert len(list(tmp_path.rglob("*.cubin"))) == total


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "86", "89", "90", "100", "120"])
@pytest.mark.parametrize("fmt", formats(), ids=lambda fmt: fmt.name)
def test_every_format_compiles(fmt: Any, capability: str) -> None:
    compiled(fmt.name, "1,16,20,40,100,600", capability)
