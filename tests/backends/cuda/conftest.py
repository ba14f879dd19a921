"""Triton kernels run in its interpreter on tensors of the CPU, unless a GPU is asked for (`cuda_device.py`).

The variable has to be set before triton is imported.
"""

from __future__ import annotations

import os

if "CHANDRA_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

import chandra.bench.interpreter  # noqa: F401
