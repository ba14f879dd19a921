"""The backends under test."""

from __future__ import annotations

import pytest
import torch
from model_kit import CPU

from chandra.ops.contracts import Backend
from chandra.ops.reference import ReferenceBackend

torch.set_num_threads(1)  # tiny tensors


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "reference":
        return ReferenceBackend(CPU)
    pytest.importorskip("chandra.backends.cpu._cpu", reason="the C++ kernels are not built")
    from chandra.backends.cpu.backend import CpuBackend

    return CpuBackend(CPU)
