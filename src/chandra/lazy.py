"""Modules that are loaded on first use.

Importing torch costs about 200 MB of host memory and a second. A model that runs wholly on the C++ kernels never
needs it, so nothing below `from chandra.lazy import torch` may touch an attribute of torch at import time.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Lazy(ModuleType):
    """Stands for a module until an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import hashlib

    import filelock
    import torch
else:
    torch = _Lazy("torch")
    filelock = _Lazy("filelock")
    hashlib = _Lazy("hashlib")  # loads OpenSSL: 4 MB

__all__ = ["filelock", "hashlib", "torch"]
