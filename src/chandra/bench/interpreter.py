"""What Triton's interpreter lacks, or does otherwise than GPUs do. To be imported before kernels are run in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra.cuda import libdevice
from triton.runtime import interpreter


def _float32(handle: Any) -> Any:
    return handle.data if handle.dtype.scalar != tl.bfloat16 else (handle.data.astype(np.uint32) << 16).view(np.float32)


def _dot(_: object, a: Any, b: Any, d: Any, *__: object) -> Any:
    """The interpreter keeps bfloat16 as uint16, and would multiply those as whole numbers.

    In float64 the products of 16-bit numbers add up exactly, in whatever order numpy takes for this many columns.
    """
    product = np.matmul(_float32(a), _float32(b), dtype=np.float64).astype(np.float32) + d.data
    return interpreter.TensorHandle(product, d.dtype.scalar)


def _cast(builder: Any, handle: Any, dtype: Any) -> Any:
    """The interpreter cuts float32 off to bfloat16; GPUs round to nearest, ties to even."""
    if (handle.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return _cast_impl(builder, handle, dtype)
    bits = handle.data.view(np.uint32)
    return interpreter.TensorHandle(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), dtype.scalar)


def _byte_perm(x: Any, y: Any, select: Any) -> Any:
    """What the instruction does: byte i of the result is the one of y:x that nibble i of `select` names."""
    x, y, select = (
        np.asarray(v.handle.data if isinstance(v, tl.tensor) else getattr(v, "value", v)) for v in (x, y, select)
    )
    pool = (y.astype(np.int64) & 0xFFFFFFFF) << 32 | (x.astype(np.int64) & 0xFFFFFFFF)
    picked = sum((pool >> ((select.astype(np.int64) >> 4 * i & 7) * 8) & 0xFF) << 8 * i for i in range(4))
    data = picked.astype(np.uint32).view(np.int32)
    return tl.tensor(interpreter.TensorHandle(data, tl.int32), tl.block_type(tl.int32, list(data.shape)))


def _patch_tensor(tensor: Any, scope: Any) -> None:
    """Its scalars are arrays of one element, which newer numpy does not make whole numbers."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_once(function: Any) -> Any:
    """Functions that kernels call would patch the whole language again, a quarter of the time."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    fresh = any(tl.core.is_builtin(language.load) for language in languages)
    return _patch_lang(function) if fresh else interpreter._LangPatchScope()


_patch_lang, _patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_once, _patch_tensor
interpreter.InterpreterBuilder.create_dot = _dot
libdevice.byte_perm = _byte_perm
_cast_impl = interpreter.InterpreterBuilder.cast_impl
interpreter.InterpreterBuilder.cast_impl = _cast
