"""GPUs that are missing or cannot be used: the errors, with a driver library that answers as a real one would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chandra.backends.cuda import driver
from chandra.errors import DeviceError
from chandra.planner.calibrate import discover
from chandra.planner.request import PlanRequest

DRIVER = """
#include <string.h>
int cuInit(unsigned f) { return %(init)d; }
int cuDriverGetVersion(int *v) { *v = %(version)d; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strcpy(s, "NVIDIA GeForce RTX 3060"); return 0; }
int cuDeviceGetPCIBusId(char *s, int n, int d) { strcpy(s, "0000:01:00.0"); return 0; }
int cuDeviceTotalMem_v2(unsigned long *n, int d) { *n = 12ul << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? %(capability)d : 0; return 0; }
"""
ASK = """
import torch
from chandra.backends.cuda.driver import usable_gpus
from chandra.errors import DeviceError
torch.version.cuda = {cuda!r}
try:
    print(usable_gpus())
except DeviceError as error:
    print(error)
"""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def ask(folder: Path, cuda: str | None = "12.8", **answers: int) -> str:
    """What a process says that finds this driver; torch takes itself to be built for `cuda`."""
    values = {"init": 0, "version": 12080, "capability": 8} | answers
    (folder / "driver.c").write_text(DRIVER % values)
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, folder / "driver.c"], check=True)
    env = os.environ | {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ASK.format(cuda=cuda)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@needs_cc
@pytest.mark.parametrize(
    ("said", "answers"),
    [
        ("built without CUDA", {"cuda": None}),
        ("knows CUDA 11.8, torch is built for CUDA 12.8", {"version": 11080}),
        ("compute capability 6.0", {"capability": 6}),
        ("too old or does not match", {"init": 803}),
        ("does not start (error 999)", {"init": 999}),
    ],
)
def test_what_cannot_be_used_says_why_and_what_to_do(tmp_path: Path, said: str, answers: dict[str, int]) -> None:
    first, *hint = ask(tmp_path, **answers).splitlines()
    assert said in first
    assert "--device cpu" in hint[0]


@needs_cc
def test_what_can_be_used_is_described(tmp_path: Path) -> None:
    text = ask(tmp_path)
    assert "name='cuda:0', kind='cuda', cap=12884901888, bandwidth=360000000000.0, link=24000000000.0" in text
    assert ask(tmp_path, init=100).strip() == "()"  # a driver without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_refuses_one_by_name(tmp_path: Path) -> None:
    from chandra.config import Settings

    assert driver.usable_gpus() == ()
    with pytest.raises(DeviceError, match="there is no device cuda:0"):
        discover(PlanRequest(device=("cuda:0=6GiB",)), Settings(home=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backend_itself_refuses_as_well() -> None:
    from chandra.backends import make_backend
    from chandra.memory.device import Device

    with pytest.raises(DeviceError, match="there is no GPU cuda:0"):
        make_backend(Device("cuda:0", "cuda", 1 << 30))
