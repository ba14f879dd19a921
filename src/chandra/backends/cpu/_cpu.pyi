from typing import Any

from numpy.typing import NDArray

def set_threads(n: int) -> None: ...
def threads() -> int: ...
def set_isa(name: str) -> None: ...
def isa() -> str: ...
def best_isa() -> str: ...

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
