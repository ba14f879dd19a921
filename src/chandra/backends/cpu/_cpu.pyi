from typing import Any, overload

from numpy.typing import NDArray

from chandra.ops.contracts import Experts, Linear, Norm

def set_threads(n: int) -> None: ...
def threads() -> int: ...
def set_isa(name: str) -> None: ...
def isa() -> str: ...
def best_isa() -> str: ...
def scratch_held() -> int: ...

class Rope:
    def __init__(self, inv_freq: NDArray[Any], scale: float, interleaved: bool) -> None: ...

class HeadNorm:
    def __init__(self, weight: NDArray[Any], bias: NDArray[Any] | None, eps: float, layer: bool) -> None: ...

class Attention:
    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        rope: Rope | None,
        q_norm: HeadNorm | None,
        k_norm: HeadNorm | None,
    ) -> None: ...
    def __call__(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        positions: NDArray[Any],
        query_start: NDArray[Any],
        context_lens: NDArray[Any],
        cache_k: NDArray[Any],
        cache_v: NDArray[Any],
        kv_type: str,
        block_size: int,
        block_table: NDArray[Any],
        slots: NDArray[Any],
        out: NDArray[Any],
    ) -> None: ...

def attention_scratch_bytes(
    num_heads: int, num_kv_heads: int, head_dim: int, rows: int, sequences: int, context: int
) -> int: ...

class Weight:
    @overload
    def __init__(
        self,
        format: str,
        shape: tuple[int, ...],
        parts: dict[str, NDArray[Any]],
        repack: bool = True,
        mapped: bool = False,
    ) -> None: ...
    @overload
    def __init__(self, format: str, shape: tuple[int, ...], panels: NDArray[Any]) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def in_place(self) -> bool: ...
    @property
    def kernel(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

def repacked_nbytes(format: str, shape: tuple[int, ...]) -> int: ...
def pack_weight(format: str, shape: tuple[int, ...], parts: dict[str, NDArray[Any]], out: NDArray[Any]) -> None: ...
def embed(ids: NDArray[Any], table: Weight, scale: float, out: NDArray[Any]) -> None: ...
def norm_linear(
    x: NDArray[Any], norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[NDArray[Any], ...]
) -> None: ...
def gate_up(
    x: NDArray[Any], norm: Norm | None, gate: Linear | None, up: Linear, activation: str, out: NDArray[Any]
) -> None: ...
def linear_add(x: NDArray[Any], linear: Linear, post_norm: Norm | None, residual: NDArray[Any]) -> None: ...
def moe_add(
    x: NDArray[Any], norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: NDArray[Any]
) -> None: ...
def logits(
    x: NDArray[Any],
    rows: NDArray[Any],
    norm: Norm,
    head: Linear,
    scale: float,
    softcap: float | None,
    out: NDArray[Any],
) -> None: ...
def linear_scratch_bytes(n: int, columns: int, rows: int) -> int: ...
def moe_scratch_bytes(n: int, hidden: int, intermediate: int, num_experts: int, top_k: int) -> int: ...
