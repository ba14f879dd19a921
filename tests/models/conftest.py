"""The backends under test."""

from __future__ import annotations

import pytest
import torch
from model_kit import CPU

from chandra.ops.contracts import Backend
from chandra.ops.reference import ReferenceBackend

torch.set_num_threads(1)  # tiny tensors

BACKENDS = {"reference": ReferenceBackend}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param](CPU)
