"""Rehearses a tiny model for a GPU that is not there, with Triton's compiler: prints how many kernels were compiled."""

from __future__ import annotations

import torch
from cuda_model import BLOCKS, Model
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from chandra.backends.cuda.accelerator import Accelerator
from chandra.backends.cuda.backend import CudaBackend
from chandra.memory.device import Device


class Absent:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def main() -> None:
    driver.set_active(Absent())
    told: list[tuple[int, int]] = []
    model = Model("llama", [CudaBackend(Device("cuda:0", "cuda", 1 << 27), accelerator=Accelerator())])
    for _ in range(2):  # the second time nothing is left to do
        model.decoder.rehearse(model.pool.layer, BLOCKS, lambda done, total: told.append((done, total)))
    print(told)


if __name__ == "__main__":
    main()
