"""The op contracts: what the decoder asks of a device.

The decoder composes these few fused ops and never computes anything itself, so the same decoder runs on numpy arrays
(the C++ kernels) and on torch tensors (CUDA, and the reference). Every op writes into buffers the caller owns, which
is what lets the workspace be planned and a step be replayed. Activations are float32 on the CPU.

Results must not depend on company: a row's result is the same whatever other rows are in the batch, how a prompt was
cut into chunks and how many threads computed it.

Shapes: `n` rows (tokens) of one ragged batch, `b` sequences, `H` query heads, `K` key/value heads, `d` head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from chandra.memory.device import Device
from chandra.quant.base import Format, PackedWeight

Array: TypeAlias = Any  # np.ndarray on the host, torch.Tensor on CUDA; only the backend that made it looks inside
IntArray: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]
HostBytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]


@dataclass(frozen=True)
class Weight:
    """A weight on its device, in the layout its kernel wants. `handle` belongs to the backend."""

    format: Format
    shape: tuple[int, ...]
    nbytes: int
    handle: Any


@dataclass(frozen=True)
class Linear:
    """`y = x @ weight.T + bias`. weight `(out, in)`, bias `(out,)` float32 or None."""

    weight: Weight
    bias: Array | None = None


@dataclass(frozen=True)
class Norm:
    """RMS norm (`weight * x / rms(x)`) or layer norm (with bias). weight and bias `(width,)` float32."""

    weight: Array
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: Array | None = None


@dataclass(frozen=True)
class RopeParams:
    """Rotary embedding: angle of pair `i` at position `p` is `p * inv_freq[i]`; cos and sin are multiplied by `scale`.

    inv_freq is float32 `(rotary_dim / 2,)`; the dims past rotary_dim pass unchanged. Pairs are `(i, i + rotary_dim/2)`,
    or `(2i, 2i+1)` when `interleaved` (GGUF files of llama and mistral are stored for that form).
    """

    inv_freq: Array
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionParams:
    """What one layer's attention needs besides q, k and v. `window` counts the tokens a query sees, itself included."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: RopeParams | None = None
    q_norm: Norm | None = None  # per head, before rope
    k_norm: Norm | None = None


@dataclass(frozen=True)
class Experts:
    """Mixture of experts. router `(E, hidden)`; gate, up `(E, ff, hidden)`; down `(E, hidden, ff)`.

    The `top_k` largest router logits are softmaxed (`normalize`: among themselves; otherwise the probabilities of the
    softmax over all experts are kept as they are).
    """

    router: Linear
    gate: Weight
    up: Weight
    down: Weight
    top_k: int
    normalize: bool
    activation: Activation = "silu"


@dataclass(frozen=True)
class ForwardBatch:
    """One ragged batch: sequence `i` owns rows `query_start[i]:query_start[i+1]`. All arrays are int32 on the host.

    A prefill, a chunk of one and a decode (one row) are the same thing.
    """

    token_ids: IntArray  # (n,)
    positions: IntArray  # (n,)
    query_start: IntArray  # (b + 1,)
    context_lens: IntArray  # (b,) tokens in the cache once this batch is written
    logit_rows: IntArray  # (r,) rows whose logits are wanted


@dataclass(frozen=True)
class KVLayer:
    """The cache of one layer. k and v: `(num_blocks, num_kv_heads, block_size, row)`, row = head_dim values of
    `kv_type` (f32, f16, bf16 as their own dtype, bf16 as uint16; q8_0 and q4_0 as uint8 bytes in GGUF block layout)."""

    k: Array
    v: Array
    kv_type: str
    block_size: int


@dataclass(frozen=True)
class KVTables:
    """Where a batch's tokens live, for one layer group. Token at position p of sequence i is in block
    `block_table[i, p // block_size]` (-1: released, outside the window); row j is written to
    `slots[j] = block * block_size + offset`."""

    block_table: IntArray  # (b, blocks)
    slots: IntArray  # (n,)


class KVView(Protocol):
    """What the decoder sees of the KV cache during one step."""

    def layer(self, index: int) -> KVLayer: ...

    def tables(self, index: int) -> KVTables:
        """The tables of the group that layer `index` belongs to."""
        ...


class Copy(Protocol):
    """A copy between the host and a device that runs beside computation."""

    def wait(self) -> None:
        """Ops issued from now on come after the copy. Raises what the copy raised, if that is known by now."""
        ...

    def done(self) -> None:
        """Return when the copy is over: the host may use its bytes again. Any thread may ask. Raises what it raised."""
        ...


class Copied:
    """A copy that is over."""

    def wait(self) -> None:
        pass

    def done(self) -> None:
        pass


class Backend(ABC):
    """The ops of one device. Every `out` is written in place; inputs are left alone unless said otherwise."""

    device: Device

    # memory

    def context_bytes(self) -> int:
        """Bytes of the device that merely using it has taken so far: a context, kernels, libraries."""
        return 0

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Uninitialized memory on the device. `dtype` is a numpy name; bfloat16 is `uint16`."""

    @abstractmethod
    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        """A device array with the host's contents (the host array itself, where that is the same memory)."""

    @abstractmethod
    def download(self, array: Array) -> np.ndarray[Any, Any]:
        """A host array with the device's contents."""

    def write(self, host: np.ndarray[Any, Any], out: Array) -> None:
        """Copy a host array into a device array of the same shape (the hidden state, between devices)."""
        out[...] = self.upload(host)

    def trim(self, array: Array, rows: int) -> bool:  # noqa: ARG002
        """Give the memory behind `array[rows:]` back to the system; what was there is lost, and writing there takes
        memory again. False, with nothing done, where a device cannot do that."""
        return False

    def release_unused(self) -> None:  # noqa: B027
        """Give memory that is free, but kept in case it is asked for again, back to the system."""

    @abstractmethod
    def load_weight(self, weight: PackedWeight, lookup: bool = False) -> Weight:
        """Put a weight where this device's kernels want it, repacked if that gains. `lookup`: only `embed` will read
        it. Raises BudgetExceeded."""

    # weights in memory that exists already, to be streamed

    @abstractmethod
    def weight_nbytes(self, format: Format, shape: tuple[int, ...]) -> int:
        """Bytes of a weight in this device's layout, a multiple of 64."""

    @abstractmethod
    def pack_weight(self, weight: PackedWeight, out: HostBytes) -> None:
        """Write a weight in this device's layout to host memory of `weight_nbytes` bytes, aligned to 64. Takes no
        memory of the device."""

    @abstractmethod
    def bind_weight(self, format: Format, shape: tuple[int, ...], memory: Array) -> Weight:
        """A weight over device bytes (uint8, aligned to 64) that hold this layout when an op reads them. Copies nothing
        and keeps `memory` alive."""

    @abstractmethod
    def host_buffer(self, nbytes: int) -> HostBytes:
        """Host memory from which copies to this device are fast, aligned to 64."""

    # copies beside computation: after ops that were issued before, and in the order in which they are begun

    def fetch(self, host: np.ndarray[Any, Any], out: Array) -> Copy:
        """Begin to copy a host array into a device array of the same shape."""
        self.write(host, out)
        return Copied()

    def store(self, array: Array, host: np.ndarray[Any, Any]) -> Copy:
        """Begin to copy a device array into a host array of the same shape."""
        host[...] = self.download(array)
        return Copied()

    # ops

    def step(
        self,
        segment: Hashable | None,  # noqa: ARG002
        batch: ForwardBatch,  # noqa: ARG002
        tables: Sequence[KVTables],  # noqa: ARG002
        ops: Callable[[], None],
    ) -> None:
        """Do `ops`, which makes all calls of a step for this device. A device may record them and, in a later step of
        the same `segment` whose batch has the same sizes, repeat the record instead: `ops` must do nothing but make
        calls that depend on the contents of `batch` and `tables` (all that it uses) and of buffers alone. What belongs
        to no segment (None) is never repeated."""
        ops()

    def forget_steps(self) -> None:  # noqa: B027
        """Drop the records of all steps: buffers that they use have moved or are gone."""

    def rehearse(self, ops: Callable[[], None], told: Callable[[int, int], None]) -> None:  # noqa: B027
        """Get ready for ops like these, which need not be done: a device may compile what they would start. `told` is
        told how many kernels are done, and of how many."""

    @abstractmethod
    def embed(self, batch: ForwardBatch, table: Weight, scale: float, out: Array) -> None:
        """out `(n, hidden)` = table[token_ids] * scale."""

    @abstractmethod
    def norm_linear(self, x: Array, norm: Norm | None, linears: tuple[Linear, ...], outs: tuple[Array, ...]) -> None:
        """outs[i] `(n, out_i)` = linears[i](norm(x)), x `(n, in)`. The input is normalized and quantized once."""

    @abstractmethod
    def gate_up(
        self, x: Array, norm: Norm | None, gate: Linear | None, up: Linear, activation: Activation, out: Array
    ) -> None:
        """out `(n, ff)` = activation(gate(y)) * up(y), or activation(up(y)) without a gate; y = norm(x)."""

    @abstractmethod
    def linear_add(self, x: Array, linear: Linear, post_norm: Norm | None, residual: Array) -> None:
        """residual `(n, out)` += post_norm(linear(x)), x `(n, in)`."""

    @abstractmethod
    def moe_add(self, x: Array, norm: Norm | None, experts: Experts, post_norm: Norm | None, residual: Array) -> None:
        """residual `(n, hidden)` += post_norm(sum of the chosen experts of norm(x)). x may be the residual itself."""

    @abstractmethod
    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        batch: ForwardBatch,
        params: AttentionParams,
        cache: KVLayer,
        tables: KVTables,
        out: Array,
    ) -> None:
        """Head norms and rope on q `(n, H*d)` and k `(n, K*d)` (both may be overwritten), k and v written to the
        cache at `tables.slots`, then causal attention over the cache; out `(n, H*d)`."""

    @abstractmethod
    def logits(
        self, x: Array, rows: IntArray, norm: Norm, head: Linear, scale: float, softcap: float | None, out: Array
    ) -> None:
        """out `(r, vocab)` float32 = head(norm(x[rows])) * scale, then softcap * tanh(out / softcap)."""
