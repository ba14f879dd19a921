"""Where kernels are tested: in Triton's interpreter, or on a GPU: `CHANDRA_TEST_GPU=cuda pytest …`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

DEVICE = os.environ.get("CHANDRA_TEST_GPU", "cpu")


def call(op: Callable[..., None], *arguments: Any) -> None:
    """op(*arguments). On a GPU their tensors are moved there, and what the op wrote comes back."""
    if DEVICE == "cpu":
        op(*arguments)
        return
    moved = [_moved(argument) for argument in arguments]
    op(*moved)
    for here, there in zip(arguments, moved, strict=True):
        _fetch(there, here)


def _moved(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name)) for field in fields(value)})
    return value


def _fetch(there: Any, here: Any) -> None:
    if isinstance(here, torch.Tensor):
        here.copy_(there)
    elif is_dataclass(here):
        for field in fields(here):
            _fetch(getattr(there, field.name), getattr(here, field.name))
