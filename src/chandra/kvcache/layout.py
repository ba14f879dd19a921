"""How much KV cache a model needs: layer groups, bytes per row, blocks per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from chandra.errors import UnsupportedError
from chandra.quant import BlockFormat, get_format

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16"}


def kv_row_bytes(kv_type: str, head_dim: int) -> int:
    """Bytes of one head's key (or value) of one token. Raises UnsupportedError."""
    if kv_type not in KV_TYPES:
        raise UnsupportedError(f"unknown KV cache type {kv_type!r}", f"types: {', '.join(KV_TYPES)}")
    packed = get_format(kv_type)
    assert isinstance(packed, BlockFormat)
    if head_dim % packed.block_size:
        raise UnsupportedError(
            f"KV cache type {kv_type} packs {packed.block_size} values; a head of {head_dim} is not a multiple",
            "choose f16",
        )
    return packed.row_bytes(head_dim)


def kv_row(kv_type: str, head_dim: int) -> tuple[int, str]:
    """(length, numpy dtype) of one head's key or value in a `KVLayer` array. Raises UnsupportedError."""
    nbytes = kv_row_bytes(kv_type, head_dim)
    return (head_dim, _DTYPES[kv_type]) if kv_type in _DTYPES else (nbytes, "uint8")


class KVShape(Protocol):
    """What the cache needs to know of a layer's attention; `models.spec.AttentionSpec` has it."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window(self) -> int | None: ...


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose tokens live in the same blocks: same window, shape and device."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    device: str = "cpu"

    def token_bytes(self, kv_type: str) -> int:
        """Bytes of one token, keys and values of all layers of the group."""
        return 2 * len(self.layers) * self.num_kv_heads * kv_row_bytes(kv_type, self.head_dim)

    def window_blocks(self, block_size: int) -> int:
        """Blocks before the one being written that a query can still see. Only for groups with a window."""
        assert self.window is not None
        return -(-(self.window - 1) // block_size)

    def max_blocks(self, context_len: int, chunk: int, block_size: int, sequences: int = 1) -> int:
        """Blocks with which `sequences` of up to `context_len` tokens never run out.

        A window group holds the window and one chunk, which the sequences share. It counts on chunks that end at block
        boundaries wherever the prompt goes on, as `engine.scheduler` cuts them.
        """
        blocks = sequences * -(-context_len // block_size)
        if self.window is None:
            return blocks
        return min(blocks, sequences * self.window_blocks(block_size) + -(-chunk // block_size) + sequences - 1)


def group_layers(shapes: Sequence[KVShape], devices: Sequence[str] | None = None) -> tuple[LayerGroup, ...]:
    """Groups of the layers with these attention shapes, in order of first layer. `devices[i]` holds layer i's cache."""
    members: dict[tuple[int, int, int | None, str], list[int]] = {}
    for index, shape in enumerate(shapes):
        device = devices[index] if devices else "cpu"
        members.setdefault((shape.num_kv_heads, shape.head_dim, shape.window, device), []).append(index)
    return tuple(LayerGroup(tuple(layers), *key) for key, layers in members.items())


def kv_bytes(
    groups: Sequence[LayerGroup], kv_type: str, context_len: int, chunk: int, block_size: int, sequences: int = 1
) -> int:
    """Bytes of a cache in which `sequences` of up to `context_len` tokens always fit."""
    return sum(
        g.max_blocks(context_len, chunk, block_size, sequences) * block_size * g.token_bytes(kv_type) for g in groups
    )
